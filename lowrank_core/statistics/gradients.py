"""Moments of output gradients: the true Fisher, with labels drawn from the model's own distribution (docs/methods.md §2).

Notation::

    y        output (m,) of a layer at one token
    ℓ        -log q(label) summed over the tokens of a window, each token's label drawn from the model's q at that token
    g        ∂ℓ/∂y at one token
    G        E[g gᵀ] over tokens: ½ tr(G ΔW S ΔWᵀ) estimates the KL divergence per token, in nats, that ΔW causes

Where blocks can be chained, hidden states before each block are kept on disk, and the gradient goes back through one block after the
other: memory holds the graph of one block for one batch, and the moments of that block. Elsewhere passes through the whole model measure
as many blocks as memory holds.

With robust token weights (LEMS, ICML 2026) a gradient g_t is scaled such that its norm lies within 0.1 and 10 times the mean norm over the
tokens of its window, and the first and the last eighth of the positions are left out of G.

The labels of a window depend on the seed and the window's index alone: neither on the batch nor on the pass that draws them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import ModelError
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.experts import Expert, calling_every_expert
from lowrank_core.models.fused import layouts_of
from lowrank_core.models.handle import LayerSpec, ModelHandle
from lowrank_core.models.mapped import release
from lowrank_core.statistics import processes
from lowrank_core.statistics.experts import mixed_outputs
from lowrank_core.statistics.moments import GradientAccumulator, OutputStatistics
from lowrank_core.statistics.precision import products_in, resolved_precision, rounded
from lowrank_core.statistics.store import (
    HiddenStates,
    StoredStatistics,
    block_path,
    exclusive,
    finish,
    finished_blocks,
    free_memory,
    in_passes,
    is_finished,
    statistics_folder,
    write_block,
)
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["cached_gradients", "collect_gradients", "gradients_folder", "gradients_key", "loss_gradient", "robust_rows", "sampled_labels"]

_FORMAT = 2
"""Raise it when the meaning of a stored gradient moment changes: old caches are then ignored."""

_MEMORY_SHARE = 4
"""Gradient matrices of one pass take at most this part of the free memory."""

_LOGITS = 2**25
"""Maximum number of logits in a batch: an eighth of a GiB in float32, and as much again for each of their softmax and its gradient."""

_CLIPPED = (0.1, 10.0)
"""Times the mean of the window: between these lies a token's norm in a robust moment."""

_ENDS = 8
"""One position in so many is left out of a robust moment at either end of a window."""

_CLASSES = 256
"""Classes whose probabilities are summed before a label is looked for among them."""


def _uniform(seed: int, window: int, tokens: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {window}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


def sampled_labels(logits: Tensor, seed: int, first_window: int) -> Tensor:
    """Return a label (B, T) for each token, drawn from softmax(logits (B, T, V)) by the inverse of its distribution function.

    Window ``first_window`` + b has a generator of its own, so equal logits give equal labels whatever the batch.
    """
    return _labels(_exponentials(logits), seed, first_window)


def loss_gradient(logits: Tensor, seed: int, first_window: int) -> Tensor:
    """Return ∂ℓ/∂logits (B, T, V) = softmax - indicator of the label that ``sampled_labels`` draws, in the dtype of ``logits``."""
    weights = _exponentials(logits)
    labels = _labels(weights, seed, first_window)[..., None]
    result = weights.div_(weights.sum(-1, keepdim=True))
    return result.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=result.dtype)).to(logits.dtype)


def _exponentials(logits: Tensor) -> Tensor:
    """Return exp(logits - max) (B, T, V), in float32 at least."""
    precise = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return (precise - precise.amax(-1, keepdim=True)).exp_()


def _labels(weights: Tensor, seed: int, first_window: int) -> Tensor:
    windows, context, _ = weights.shape
    draws = torch.stack([_uniform(seed, first_window + index, context) for index in range(windows)]).to(weights.device)
    return _drawn(weights.flatten(0, 1), draws.flatten()).reshape(windows, context)


def _drawn(weights: Tensor, draws: Tensor) -> Tensor:
    """Return the class (N,) in which each of ``draws`` (N,), in [0, 1), falls by ``weights`` (N, V): its group first."""
    groups = functional.pad(weights, (0, -weights.shape[1] % _CLASSES)).reshape(len(weights), -1, _CLASSES)
    sums = groups.sum(-1, dtype=torch.float64).cumsum(-1)
    targets = (draws * sums[:, -1])[:, None]
    group = torch.searchsorted(sums, targets, right=True).clamp(max=sums.shape[1] - 1)
    before = functional.pad(sums, (1, 0)).gather(1, group)
    inner = groups[torch.arange(len(groups), device=groups.device), group[:, 0]].to(torch.float64).cumsum(-1)
    place = torch.searchsorted(inner, targets - before, right=True).clamp(max=_CLASSES - 1)
    return (group * _CLASSES + place)[:, 0].clamp(max=weights.shape[1] - 1)


@contextmanager
def _without_parameter_gradients(module: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, whatever they did before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def robust_rows(gradients: Tensor, tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return the gradients (K, m) that count, their norms clipped, and which of the rows they are (N,).

    Args:
        gradients: (N, m).
        tokens: number of each row's token in its batch (N,): windows of ``context`` tokens one after the other.
    """
    norms = torch.linalg.vector_norm(gradients, dim=-1, dtype=torch.promote_types(gradients.dtype, torch.float32))
    _, window = torch.unique(tokens // context, return_inverse=True)
    sums = norms.new_zeros(len(window)).index_add_(0, window, norms)
    means = (sums / torch.bincount(window, minlength=len(window)).clamp(min=1))[window]
    clipped = norms.clamp(_CLIPPED[0] * means, _CLIPPED[1] * means)
    scale = torch.where(norms > 0, clipped / norms, torch.zeros_like(norms))
    position, ends = tokens % context, context // _ENDS
    counted = (position >= ends) & (position < context - ends)
    return (gradients * scale[:, None].to(gradients.dtype))[counted], counted


@contextmanager
def _recording(handle: ModelHandle, layers: Sequence[LayerSpec], context: int, *, robust: bool) -> Iterator[dict[str, GradientAccumulator]]:
    """Feed an accumulator for each layer while losses on windows of ``context`` tokens are differentiated.

    The graph begins at the first of these layers: an output that nothing before it made differentiable becomes a leaf.
    """
    result = {layer.name: GradientAccumulator(layer.name, layer.shape.d_out, handle.device) for layer in layers}

    def hook_for(name: str, accumulator: GradientAccumulator) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = arguments[0].detach()
            precise = torch.promote_types(inputs.dtype, torch.float32)
            norms = torch.linalg.vector_norm(inputs, dim=-1, dtype=precise).square().flatten()
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            tokens = _tokens(handle, name, len(norms)) if robust else None

            def add(gradient: Tensor) -> None:
                rows = gradient.reshape(-1, gradient.shape[-1])
                if tokens is None:
                    accumulator.update(rows, norms)
                else:
                    rows, counted = robust_rows(rows, tokens.to(rows.device), context)
                    accumulator.update(rows, norms[counted])

            output.register_hook(add)  # type: ignore[no-untyped-call]
            return output

        return hook

    hooks = [handle.module.get_submodule(name).register_forward_hook(hook_for(name, a)) for name, a in result.items()]
    try:
        with calling_every_expert(handle.module):
            yield result
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(handle: ModelHandle, name: str, rows: int) -> Tensor:
    """Return which tokens the rows of a layer are.

    Raises:
        ModelError: its mixture of experts does not say.
    """
    expert = handle.module.get_submodule(name.rpartition(".")[0])
    if not isinstance(expert, Expert):
        return torch.arange(rows)
    if expert.routed is None or len(expert.routed.tokens) != rows:
        raise ModelError(f"{name}: its mixture does not say which tokens its rows are, which robust token weights need. Leave them out.")
    return expert.routed.tokens


class _Measurement:
    """One measurement of gradients: which blocks go into one pass, and the pass itself."""

    def __init__(self, handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, folder: Path, *, robust: bool = False) -> None:
        if not handle.layers:
            raise ModelError(f"{handle.reference} has no dense linear layer left to compress. Give the dense model.")
        handle.check_tokens(windows.ids)
        self.handle, self.seed, self.folder, self.robust = handle, config.gradient_seed, folder, robust
        self.precision = resolved_precision(config, handle)
        everyone = windows.first(config.gradient_windows)
        self.counted = everyone.windows
        self.blocks: dict[int, list[LayerSpec]] = {}
        for layer in handle.layers:
            self.blocks.setdefault(layer.shape.depth, []).append(layer)
        logits = windows.context * int(handle.module.get_input_embeddings().weight.shape[0])
        narrow = max(1, min(config.batch_size, _LOGITS // logits))
        self.first_window, self.windows = processes.share(everyone, math.lcm(config.batch_size, narrow))
        self._spans, self._narrow = self._cut(config.batch_size), self._cut(narrow)

    def _cut(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, self.windows.windows, size)]

    @cached_property
    def _runner(self) -> BlockRunner:
        """Runner of the model, which tries the chain: not while another measurement of the same model is waited for."""
        return BlockRunner(self.handle)

    @cached_property
    def chained(self) -> bool:
        """Whether blocks can be chained, and the model's end reads nothing but what the last of them gives."""
        with torch.no_grad():
            return self._runner.chained and self._runner.ends_in_logits(self.windows.ids[:1])

    def _recording(self, layers: Sequence[LayerSpec]) -> AbstractContextManager[dict[str, GradientAccumulator]]:
        return _recording(self.handle, layers, self.windows.context, robust=self.robust)

    def _ids(self, span: slice) -> Tensor:
        return self.windows.ids[span].to(self.handle.device)

    def by_pass(self, pending: Sequence[int], progress: Progress | None) -> Iterator[dict[int, dict[str, OutputStatistics]]]:
        """Yield the moments of the pending blocks, pass by pass: a chain from the last block to the first."""
        if not pending:
            return
        passes = [] if self.chained else processes.agreed(self._passes(pending))
        depth = len(self._runner.names)
        steps = len(self._spans) * (2 * depth - min(pending)) + len(self._narrow) if self.chained else len(passes) * len(self._narrow)
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, steps)

        with _without_parameter_gradients(self.handle.module), products_in(self.precision):
            yield from self._chain(set(pending), tick) if self.chained else (self._run(blocks, tick) for blocks in passes)

    # --- block by block ---

    def _chain(self, pending: set[int], tick: Callable[[], None]) -> Iterator[dict[int, dict[str, OutputStatistics]]]:
        depth, hidden = len(self._runner.names), HiddenStates(self.windows.windows, self.folder)
        self._forward(hidden, depth, tick)
        gradient = self._gradient_at_the_end(hidden, depth, tick)
        for block in range(depth - 1, min(pending) - 1, -1):
            layers = self.blocks[block] if block in pending else []
            if block:
                hidden.resume(block - 1)
            with self._recording(layers) as accumulators:
                for span in self._spans:
                    self._back_through(block, span, hidden.read(span) if block else None, gradient)
                    tick()
            release(self.handle.module)
            if layers:
                yield {block: self._finished(layers, accumulators)}

    @torch.no_grad()
    def _forward(self, hidden: HiddenStates, depth: int, tick: Callable[[], None]) -> None:
        for block in range(depth):
            for span in self._spans:
                hidden.write(span, self._runner.run(block, self._ids(span), hidden.read(span)))
                tick()
            hidden.advance(block)

    def _gradient_at_the_end(self, hidden: HiddenStates, depth: int, tick: Callable[[], None]) -> Tensor:
        """Return the gradient (windows, T, d) with respect to what the last block gives."""
        result: Tensor | None = None
        for span in self._narrow:
            read = hidden.read(span)
            assert read is not None
            state = read.clone().requires_grad_()
            with self._runner.beginning_at(depth, state):
                logits = self.handle.module(input_ids=self._ids(span), use_cache=False).logits
            logits.backward(loss_gradient(logits, self.seed, self.first_window + span.start))
            assert state.grad is not None
            result = torch.empty(self.windows.windows, *state.shape[1:], dtype=state.dtype) if result is None else result
            result[span] = state.grad
            tick()
        assert result is not None
        return result

    def _back_through(self, block: int, span: slice, given: Tensor | None, gradient: Tensor) -> None:
        """Turn the gradient with respect to what ``block`` gives into that with respect to what it is ``given``, in place."""
        state = None if given is None else given.clone().requires_grad_()
        output = self._runner.run(block, self._ids(span), state)
        if output.requires_grad:
            output.backward(gradient[span].to(output.device))  # type: ignore[no-untyped-call]
        if state is not None and state.grad is not None:
            gradient[span] = state.grad

    # --- whole passes ---

    def _passes(self, pending: Sequence[int]) -> list[list[int]]:
        """Return the pending blocks in runs whose matrices fit in a part of the free memory; a block that doesn't has a pass alone."""
        room = free_memory(self.handle.device) // _MEMORY_SHARE
        return in_passes(pending, lambda block: 8 * sum(layer.shape.d_out**2 for layer in self.blocks[block]), room)

    def _run(self, blocks: Sequence[int], tick: Callable[[], None]) -> dict[int, dict[str, OutputStatistics]]:
        """Return the moments of every layer of ``blocks``, from one pass over all windows."""
        layers = [layer for block in blocks for layer in self.blocks[block]]
        with self._recording(layers) as accumulators:
            for span in self._narrow:
                logits = self.handle.module(input_ids=self._ids(span), use_cache=False).logits
                logits.backward(loss_gradient(logits, self.seed, self.first_window + span.start))
                tick()
        return {block: self._finished(self.blocks[block], accumulators) for block in blocks}

    def _finished(self, layers: Sequence[LayerSpec], accumulators: Mapping[str, GradientAccumulator]) -> dict[str, OutputStatistics]:
        """Return the moments of a block's layers, those of experts mixed with their mixture's."""
        counted = self.windows.context - (2 * (self.windows.context // _ENDS) if self.robust else 0)
        tokens = self.counted * counted
        sums = {layer.name: processes.merged(accumulators[layer.name]) for layer in layers}
        if not processes.is_first():
            return {}
        result = {layer.name: sums[layer.name].finish(tokens if layer.shape.mixture else None) for layer in layers}
        for mixture in dict.fromkeys(filter(None, (layer.shape.mixture for layer in layers))):
            members = {layer.name: result[layer.name] for layer in layers if layer.shape.mixture == mixture}
            result |= mixed_outputs(members, tokens)
        return result


def collect_gradients(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, robust: bool = False, progress: Progress | None = None
) -> Mapping[str, OutputStatistics]:
    """Return the moments of the output gradients of every compressible layer, by its name, in memory.

    They are measured on the first ``config.gradient_windows`` windows, block by block or in as many passes as memory asks for: the passes
    draw the same labels, so their number changes nothing. The backward pass is in the model's dtype. ``progress`` counts batches over all
    blocks or passes; ``robust``: with robust token weights.

    Raises:
        NumericalError: a gradient is NaN or Inf, or none reaches a layer; names the layer.
        ModelError: the model has nothing to compress, or the windows do not fit it; or a mixture of experts does not say which tokens
            its rows are, which robust weights need.
    """
    result: dict[str, OutputStatistics] = {}
    with TemporaryDirectory() as folder:
        measurement = _Measurement(handle, windows, config, Path(folder), robust=robust)
        for blocks in measurement.by_pass(list(measurement.blocks), progress):
            for statistics in blocks.values():
                result |= statistics
    return {layer.name: result[layer.name] for layer in handle.layers}


def gradients_key(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, robust: bool = False) -> str:
    """Return the name of these moments: a hash of model, tokens and seed, of the fused projections that are held as linear layers, and of
    robust token weights where they are used.
    """
    parts = ["gradients", _FORMAT, handle.fingerprint, windows.first(config.gradient_windows).sha256, config.gradient_seed]
    split = sorted(layouts_of(handle.module))
    return hashlib.sha256(json.dumps([*parts, *([split] if split else []), *(["robust"] if robust else [])]).encode()).hexdigest()[:32]


def gradients_folder(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, store: Path, *, robust: bool = False) -> Path:
    """Return where ``store`` keeps these moments."""
    return statistics_folder(store, rounded(gradients_key(handle, windows, config, robust=robust), config, handle), windows.context)


def cached_gradients(
    handle: ModelHandle,
    windows: WindowSet,
    config: CalibrationConfig,
    store: Path,
    *,
    robust: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, OutputStatistics]:
    """Return the same as ``collect_gradients``, kept in ``store`` pass by pass and read from there layer by layer.

    An interrupted measurement goes on after its last finished pass. Where another process is at the same one, this one waits for it.

    Raises:
        as ``collect_gradients``; NumericalError also where the stored ones are damaged.
    """
    folder = gradients_folder(handle, windows, config, store, robust=robust)
    if not processes.is_first():
        if processes.agreed(True):
            with TemporaryDirectory() as scratch:
                measurement = _Measurement(handle, windows, config, Path(scratch), robust=robust)
                for _ in measurement.by_pass(processes.agreed([]), progress):
                    pass
            processes.agreed(None)
    elif processes.agreed(not is_finished(folder)):
        measurement = _Measurement(handle, windows, config, folder, robust=robust)

        def waiting() -> None:
            if progress is not None:
                progress(0, measurement.windows.windows)

        with exclusive(folder, waiting):
            _store_passes(measurement, folder, progress)
            finish(folder)
        processes.agreed(None)
    return StoredStatistics(folder, "outputs", OutputStatistics)


def _store_passes(measurement: _Measurement, folder: Path, progress: Progress | None) -> None:
    done = finished_blocks(folder, "outputs")
    pending = processes.agreed([block for block in measurement.blocks if block not in done])
    began = time.perf_counter()
    for blocks in measurement.by_pass(pending, progress):
        seconds = (time.perf_counter() - began) / len(blocks)
        for block, statistics in blocks.items():
            write_block(block_path(folder, "outputs", block), statistics, seconds)
        began = time.perf_counter()

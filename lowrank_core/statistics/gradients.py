"""Moments of output gradients: the true Fisher, with labels drawn from the model's own distribution (docs/methods.md §2).

Notation::

    y        output (m,) of a layer at one token
    ℓ        -log q(label) summed over the tokens of a window, each token's label drawn from the model's q at that token
    g        ∂ℓ/∂y at one token
    G        E[g gᵀ] over tokens: ½ tr(G ΔW S ΔWᵀ) estimates the KL divergence per token, in nats, that ΔW causes

The labels of a window depend on the seed and the window's index alone: neither on the batch nor on the pass that draws them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import ModelError
from lowrank_core.models.experts import calling_every_expert
from lowrank_core.models.fused import layouts_of
from lowrank_core.models.handle import LayerSpec, ModelHandle
from lowrank_core.statistics.experts import mixed_outputs
from lowrank_core.statistics.moments import GradientAccumulator, OutputStatistics
from lowrank_core.statistics.store import (
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

__all__ = ["cached_gradients", "collect_gradients", "gradients_key", "sampled_labels"]

_FORMAT = 1
"""Raise it when the meaning of a stored gradient moment changes: old caches are then ignored."""

_MEMORY_SHARE = 4
"""Gradient matrices of one pass take at most this part of the free memory."""

_LOGITS = 2**27
"""Maximum number of logits in a batch: half a GiB in float32, and as much again for each of their gradient and softmax."""

_LABEL_ROWS = 256
"""Tokens whose distribution is summed in float64 at a time."""


def _uniform(seed: int, window: int, tokens: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {window}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


def sampled_labels(logits: Tensor, seed: int, first_window: int) -> Tensor:
    """Return a label (B, T) for each token, drawn from softmax(logits (B, T, V)) by the inverse of its distribution function.

    Window ``first_window`` + b has a generator of its own, so equal logits give equal labels whatever the batch.
    """
    labels = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    for index, window in enumerate(logits):
        draws = _uniform(seed, first_window + index, len(window)).to(logits.device)
        for start in range(0, len(window), _LABEL_ROWS):
            span = slice(start, start + _LABEL_ROWS)
            sums = window[span].to(torch.float64).softmax(-1).cumsum(-1)
            targets = (draws[span] * sums[:, -1])[:, None]
            labels[index, span] = torch.searchsorted(sums, targets, right=True)[:, 0].clamp(max=sums.shape[1] - 1)
    return labels


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


@contextmanager
def _recording(handle: ModelHandle, layers: Sequence[LayerSpec]) -> Iterator[dict[str, GradientAccumulator]]:
    """Feed an accumulator for each layer while losses are differentiated.

    The graph begins at the first of these layers: an output that nothing before it made differentiable becomes a leaf.
    """
    result = {layer.name: GradientAccumulator(layer.name, layer.shape.d_out, handle.device) for layer in layers}

    def hook_for(accumulator: GradientAccumulator) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = arguments[0].detach()
            norms = inputs.to(torch.promote_types(inputs.dtype, torch.float32)).square().sum(-1).flatten()
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: accumulator.update(gradient.reshape(-1, gradient.shape[-1]), norms)
            )
            return output

        return hook

    hooks = [handle.module.get_submodule(name).register_forward_hook(hook_for(a)) for name, a in result.items()]
    try:
        with calling_every_expert(handle.module):
            yield result
    finally:
        for hook in hooks:
            hook.remove()


class _Measurement:
    """One measurement of gradients: which blocks go into one pass, and the pass itself."""

    def __init__(self, handle: ModelHandle, windows: WindowSet, config: CalibrationConfig) -> None:
        if not handle.layers:
            raise ModelError(f"{handle.reference} has no dense linear layer left to compress. Give the dense model.")
        handle.check_tokens(windows.ids)
        self.handle, self.seed = handle, config.gradient_seed
        self.windows = windows.first(config.gradient_windows)
        logits = windows.context * int(handle.module.get_input_embeddings().weight.shape[0])
        self._batch_size = max(1, min(config.batch_size, _LOGITS // logits))
        self.blocks: dict[int, list[LayerSpec]] = {}
        for layer in handle.layers:
            self.blocks.setdefault(layer.shape.depth, []).append(layer)
        self.batches = -(-self.windows.windows // self._batch_size)

    def passes(self, pending: Sequence[int]) -> list[list[int]]:
        """Return the pending blocks in runs whose matrices fit in a part of the free memory; a block that doesn't has a pass alone."""
        room = free_memory(self.handle.device) // _MEMORY_SHARE
        return in_passes(pending, lambda block: 8 * sum(layer.shape.d_out**2 for layer in self.blocks[block]), room)

    def run(self, blocks: Sequence[int], tick: Callable[[], None]) -> dict[int, dict[str, OutputStatistics]]:
        """Return the moments of every layer of ``blocks``, from one pass over all windows."""
        layers = [layer for block in blocks for layer in self.blocks[block]]
        with _without_parameter_gradients(self.handle.module), _recording(self.handle, layers) as accumulators:
            for start in range(0, self.windows.windows, self._batch_size):
                ids = self.windows.ids[start : start + self._batch_size].to(self.handle.device)
                logits = self.handle.module(input_ids=ids, use_cache=False).logits
                labels = sampled_labels(logits.detach(), self.seed, start)
                precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = functional.cross_entropy(precise.flatten(0, 1), labels.flatten(), reduction="sum")
                loss.backward()  # type: ignore[no-untyped-call]
                tick()
        return {block: self._finished(self.blocks[block], accumulators) for block in blocks}

    def _finished(self, layers: Sequence[LayerSpec], accumulators: Mapping[str, GradientAccumulator]) -> dict[str, OutputStatistics]:
        """Return the moments of a block's layers, those of experts mixed with their mixture's."""
        tokens = self.windows.ids.numel()
        result = {layer.name: accumulators[layer.name].finish(tokens if layer.shape.mixture else None) for layer in layers}
        for mixture in dict.fromkeys(filter(None, (layer.shape.mixture for layer in layers))):
            members = {layer.name: result[layer.name] for layer in layers if layer.shape.mixture == mixture}
            result |= mixed_outputs(members, tokens)
        return result

    def by_pass(self, pending: Sequence[int], progress: Progress | None) -> Iterator[dict[int, dict[str, OutputStatistics]]]:
        """Yield the moments of the pending blocks, pass by pass."""
        passes = self.passes(pending)
        total, done = len(passes) * self.batches, 0

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        for blocks in passes:
            yield self.run(blocks, tick)


def collect_gradients(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, progress: Progress | None = None
) -> Mapping[str, OutputStatistics]:
    """Return the moments of the output gradients of every compressible layer, by its name, in memory.

    They are measured on the first ``config.gradient_windows`` windows, in as many passes as memory asks for: the passes draw the same
    labels, so their number changes nothing. The backward pass is in the model's dtype. ``progress`` counts batches over all passes.

    Raises:
        NumericalError: a gradient is NaN or Inf, or none reaches a layer; names the layer.
        ModelError: the model has nothing to compress, or the windows do not fit it.
    """
    measurement = _Measurement(handle, windows, config)
    result: dict[str, OutputStatistics] = {}
    for blocks in measurement.by_pass(list(measurement.blocks), progress):
        for statistics in blocks.values():
            result |= statistics
    return result


def gradients_key(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig) -> str:
    """Return the name of these moments: a hash of model, tokens and seed, and of the fused projections that are held as linear layers."""
    parts = ["gradients", _FORMAT, handle.fingerprint, windows.first(config.gradient_windows).sha256, config.gradient_seed]
    split = sorted(layouts_of(handle.module))
    return hashlib.sha256(json.dumps([*parts, *([split] if split else [])]).encode()).hexdigest()[:32]


def cached_gradients(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, store: Path, *, progress: Progress | None = None
) -> Mapping[str, OutputStatistics]:
    """Return the same as ``collect_gradients``, kept in ``store`` pass by pass and read from there layer by layer.

    An interrupted measurement goes on after its last finished pass. Where another process is at the same one, this one waits for it.

    Raises:
        as ``collect_gradients``; NumericalError also where the stored ones are damaged.
    """
    folder = statistics_folder(store, gradients_key(handle, windows, config), windows.context)
    if not is_finished(folder):
        measurement = _Measurement(handle, windows, config)

        def waiting() -> None:
            if progress is not None:
                progress(0, measurement.batches)

        with exclusive(folder, waiting):
            if not is_finished(folder):
                _store_passes(measurement, folder, progress)
                finish(folder)
    return StoredStatistics(folder, "outputs", OutputStatistics)


def _store_passes(measurement: _Measurement, folder: Path, progress: Progress | None) -> None:
    done = finished_blocks(folder, "outputs")
    pending = [block for block in measurement.blocks if block not in done]
    began = time.perf_counter()
    for blocks in measurement.by_pass(pending, progress):
        seconds = (time.perf_counter() - began) / len(blocks)
        for block, statistics in blocks.items():
            write_block(block_path(folder, "outputs", block), statistics, seconds)
        began = time.perf_counter()

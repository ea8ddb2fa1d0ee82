"""Calibration: block by block over the calibration windows, one set of moments for each input that layers share.

Where blocks can't be chained, whole passes take their place: no hidden states are kept, and a pass measures as many blocks as memory holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from torch import Tensor, nn

from lowrank_core.config import CALIBRATION_MATRICES, TOKENS_PER_DIMENSION, CalibrationConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.experts import Expert, calling_every_expert
from lowrank_core.models.handle import LayerSpec, ModelHandle
from lowrank_core.spectra.spectrum import LayerSpectrum, condition_number
from lowrank_core.statistics import processes
from lowrank_core.statistics.experts import mixed_inputs
from lowrank_core.statistics.influence import InfluenceAccumulator
from lowrank_core.statistics.moments import InputStatistics, OutputStatistics
from lowrank_core.statistics.pooling import PooledAccumulator, check_groups, trimmed
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
from lowrank_core.types import Progress, Vector
from lowrank_core.wording import amount

__all__ = ["LayerStatistics", "cached_statistics", "collect_statistics", "inputs_folder", "load_statistics", "statistics_key"]

_FORMAT = 3
"""Raise it when the meaning of a stored statistic changes: old caches are then ignored."""

_MEMORY_SHARE = 2
"""Moments of the blocks that one whole pass measures take at most this part of the free memory."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of every input, by input group, and how they were gathered.

    Attributes:
        inputs: by input group; from a store each is read when it is asked for, so keep what you need of it.
        config: of the calibration.
        seconds: that it took.
        outputs: moments of the output gradients by layer name, empty unless they were added (``with_outputs``).
        influence: of each block that was run, by depth: 1 - E[cos] of the hidden states before and after it; empty if one has none.
        notes: what is particular about how they were measured.
    """

    inputs: Mapping[str, InputStatistics]
    config: CalibrationConfig
    seconds: float
    outputs: Mapping[str, OutputStatistics] = field(default_factory=dict)
    influence: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def with_outputs(self, outputs: Mapping[str, OutputStatistics]) -> LayerStatistics:
        """Return the same with moments of the output gradients, as ``collect_gradients`` gives them."""
        return replace(self, outputs=outputs)

    def warnings(self) -> tuple[str, ...]:
        """Return what a user should know before trusting the covariances."""
        gradients = "Use more windows of gradients."
        return (
            *self.notes,
            *_thin(_sizes(self.inputs), "covariances", "Use more calibration windows."),
            *_thin(_sizes(self.outputs), "gradient moments", gradients),
        )

    def describe(self, spectra: Sequence[LayerSpectrum], layers: Sequence[LayerSpec]) -> dict[str, object]:
        """Return the metrics of each input, ready for JSON; ``spectra`` give the conditions of the covariances."""
        members: dict[str, list[str]] = {}
        for layer in layers:
            members.setdefault(layer.input_group, []).append(layer.name)
        values = {s.shape.name: s.input_eigenvalues for s in spectra}
        return {
            "tokens": max(tokens for tokens, _ in _sizes(self.inputs).values()),
            "seconds": self.seconds,
            "group_size": self.config.group_size,
            "group_weights": self.config.group_weights,
            "robust": self.config.robust,
            "influence": list(self.influence),
            "inputs": [_describe_input(name, members[name], s, values[name]) for name, s in self.inputs.items()],
            "warnings": list(self.warnings()),
        }


def _sizes(statistics: Mapping[str, InputStatistics] | Mapping[str, OutputStatistics]) -> Mapping[str, tuple[int, int]]:
    """Return (tokens, width) of each entry."""
    if isinstance(statistics, StoredStatistics):
        return statistics.sizes
    return {name: (entry.count, entry.width) for name, entry in statistics.items()}


def _thin(sizes: Mapping[str, tuple[int, int]], what: str, advice: str) -> tuple[str, ...]:
    thin = {name: size for name, size in sizes.items() if size[0] < TOKENS_PER_DIMENSION * size[1]}
    if not thin:
        return ()
    worst = min(thin, key=lambda name: thin[name][0] / thin[name][1])
    tokens, width = thin[worst]
    return (
        f"{len(thin)} of {len(sizes)} {what} rest on fewer than {TOKENS_PER_DIMENSION} tokens per dimension "
        f"(the thinnest, {worst}: {tokens} tokens for {width} dimensions). {advice}",
    )


def _describe_input(name: str, layers: list[str], statistics: InputStatistics, values: Vector) -> dict[str, object]:
    return {
        "input_group": name,
        "width": statistics.width,
        "layers": layers,
        "tokens": statistics.count,
        "tokens_per_dimension": statistics.count / statistics.width,
        "condition": condition_number(float(values[0]), float(values[-1]), statistics.width),
        "group_tokens": statistics.group_counts.tolist(),
        "group_kept": [weight > 0 for weight in statistics.group_weights.tolist()],
        "group_traces": statistics.group_traces.tolist(),
        "group_mean_shifts": statistics.group_mean_shifts.tolist(),
        "pooled_to_sample": statistics.pooled_to_sample,
    }


@contextmanager
def _recording(
    handle: ModelHandle, accumulators: Mapping[str, PooledAccumulator], context: int, batch: Callable[[], int]
) -> Iterator[None]:
    """Feed the accumulators while the model runs on ``batch()`` windows; the hooks are gone afterwards whatever happens."""

    def hook_for(name: str, accumulator: PooledAccumulator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        expert = handle.module.get_submodule(name.rpartition(".")[0])

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            with products_in("float32"):
                if isinstance(expert, Expert):
                    accumulator.update_routed(arguments[0], *_owners(expert, context, batch()))
                else:
                    accumulator.update(_by_window(name, arguments[0], context))

        return hook

    hooks = [handle.module.get_submodule(name).register_forward_pre_hook(hook_for(name, a)) for name, a in accumulators.items()]
    try:
        with calling_every_expert(handle.module):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _owners(expert: Expert, context: int, windows: int) -> tuple[Tensor, Tensor, int]:
    """Return routing weight and window of each row of an expert, and the windows of the batch.

    Where the mixture does not say whose rows they are, the first window has them all.
    """
    assert expert.routed is not None
    weights, tokens = expert.routed.weights, expert.routed.tokens
    owners = tokens // context if len(tokens) == len(weights) else torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
    return weights, owners, windows


def _by_window(name: str, inputs: Tensor, context: int) -> Tensor:
    """Return inputs (…, n) as (windows, context, n).

    OPT, for one, flattens them to (tokens, n) before its feed-forward layers, and latent attention has an axis of its one head.
    """
    if inputs.ndim == 3:
        return inputs
    if inputs.shape[:-1].numel() % context:
        raise ModelError(f"{name} sees only some of the tokens (an expert that others are routed to); such layers can't be calibrated.")
    return inputs.reshape(-1, context, inputs.shape[-1])


@dataclass(frozen=True)
class _Block:
    """Measurements of a block: moments by input group, and its influence if it was given and returned hidden states."""

    inputs: dict[str, InputStatistics]
    influence: float | None


class _Calibration:
    """One calibration: its blocks, what each of them needs, and the hidden states between them."""

    def __init__(self, handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, folder: Path | None = None) -> None:
        if not handle.layers:
            raise ModelError(f"{handle.reference} has no dense linear layer left to compress. Give the dense model.")
        handle.check_tokens(windows.ids)
        check_groups(config.robust, windows.windows, config.group_size)
        if config.robust == "trimmed" and processes.count() > 1:
            raise ConfigError("trimmed pooling compares all groups of windows, so it needs one process. Start one, or pool otherwise.")
        _, windows = processes.share(windows, math.lcm(config.group_size, config.batch_size))
        self.handle, self.windows, self.config, self.folder = handle, windows, config, folder
        self.precision = resolved_precision(config, handle)
        self.blocks = 1 + max(layer.shape.depth for layer in handle.layers)
        self.widths: list[dict[str, int]] = [{} for _ in range(self.blocks)]
        self.mixtures: dict[str, str] = {}
        for layer in handle.layers:
            self.widths[layer.shape.depth].setdefault(layer.input_group, layer.shape.d_in)
            if layer.name == layer.input_group:
                self.mixtures[layer.name] = layer.shape.mixture
        self.batches = -(-windows.windows // config.batch_size)
        self._hidden = HiddenStates(windows.windows, folder)

    @cached_property
    def _runner(self) -> BlockRunner:
        """Runner of the model, which tries the chain: not while another calibration of the same model is waited for."""
        return BlockRunner(self.handle)

    @property
    def total(self) -> int:
        return self.blocks * self.batches

    @property
    def note(self) -> str:
        """That whole passes are used, and why; empty where blocks are chained."""
        return f"calibrated by whole passes, not block by block: {self._runner.obstacle}" if self._runner.obstacle else ""

    def _bytes(self, block: int) -> int:
        """Return what the moments of ``block`` take while they are measured."""
        groups = -(-self.windows.windows // self.config.group_size)
        waiting = 2 * trimmed(groups) if self.config.robust == "trimmed" else 0
        return (CALIBRATION_MATRICES + waiting) * self._result_bytes(block)

    def _result_bytes(self, block: int) -> int:
        return 8 * sum(width * width for width in self.widths[block].values())

    def check_memory(self) -> None:
        """Raise ModelError unless the largest block's covariances fit, and all results and hidden states where nothing is stored."""
        needed = max(self._bytes(block) for block in range(self.blocks))
        if self.folder is None:
            needed += 2 * sum(self._result_bytes(block) for block in range(self.blocks))
            if self._runner.chained:
                needed += self.windows.ids.numel() * self.handle.width * self.handle.module.dtype.itemsize
        free = psutil.virtual_memory().available
        if self.handle.device.type == "cpu" and needed > free:
            raise ModelError(
                f"calibration of {self.handle.reference} needs about {amount(needed)} for its covariances, "
                f"and {amount(free)} are free. Use a machine with more memory, or a smaller model."
            )

    def run_from(self, first: int, progress: Progress | None) -> Iterator[dict[int, _Block]]:
        """Yield what is measured of the blocks from ``first`` on, pass by pass: one of each block, or whole ones of a few blocks."""
        for blocks in self._passes(range(first, self.blocks)):
            yield self._run(blocks, progress)

    def _passes(self, pending: Sequence[int]) -> list[list[int]]:
        if self._runner.chained:
            return [[block] for block in pending]
        return processes.agreed(in_passes(pending, self._bytes, free_memory(self.handle.device) // _MEMORY_SHARE))

    @torch.inference_mode()
    def _run(self, blocks: Sequence[int], progress: Progress | None) -> dict[int, _Block]:
        """Take all windows past one block, or through the whole model; return what is measured of ``blocks``."""
        size = self.config.batch_size
        accumulators = {block: self._accumulators(block) for block in blocks}
        influences = {block: InfluenceAccumulator(self._runner.names[block]) for block in blocks}
        with ExitStack() as stack:
            recorded = {g: a for parts in accumulators.values() for g, a in parts.items()}
            span = slice(0)
            stack.enter_context(products_in(self.precision))
            stack.enter_context(_recording(self.handle, recorded, self.windows.context, lambda: len(self.windows.ids[span])))
            for influence in influences.values():
                stack.enter_context(influence.watching(self.handle.module.get_submodule(influence.name)))
            for batch in range(self.batches):
                span = slice(batch * size, (batch + 1) * size)
                self._run_batch(blocks[0], span)
                if progress is not None:
                    progress(blocks[0] * self.batches + len(blocks) * (batch + 1), self.total)
        if self._runner.chained and blocks[0] + 1 < self.blocks:
            self._hidden.advance(blocks[0])
        return {block: _Block(self._finished(accumulators.pop(block)), processes.merged(influences[block]).finish()) for block in blocks}

    def _run_batch(self, block: int, span: slice) -> None:
        if not self._runner.chained:
            self._runner.run_all(self.windows.ids[span])
            return
        hidden = self._runner.run(block, self.windows.ids[span], self._hidden.read(span))
        if block + 1 < self.blocks:
            self._hidden.write(span, hidden)

    def _accumulators(self, block: int) -> dict[str, PooledAccumulator]:
        config = self.config
        return {
            group: PooledAccumulator(
                group,
                width,
                group_size=config.group_size,
                group_weights=config.group_weights,
                robust=config.robust,
                windows=self.windows.windows,
                device=self.handle.device,
                routed=bool(self.mixtures[group]),
            )
            for group, width in self.widths[block].items()
        }

    def _finished(self, accumulators: dict[str, PooledAccumulator]) -> dict[str, InputStatistics]:
        """Return the statistics of one block, those of experts mixed with their mixture's."""
        sums = {group: processes.merged(accumulators.pop(group)) for group in list(accumulators)}
        if not processes.is_first():
            return {}
        inputs = {group: sums.pop(group).finish() for group in list(sums)}
        for mixture in dict.fromkeys(filter(None, (self.mixtures[group] for group in inputs))):
            inputs |= mixed_inputs({group: entry for group, entry in inputs.items() if self.mixtures[group] == mixture})
        return inputs

    @property
    def stored_blocks(self) -> int:
        """Return the number of consecutive stored blocks in ``folder``."""
        assert self.folder is not None
        return next((b for b in range(self.blocks) if not block_path(self.folder, "inputs", b).exists()), self.blocks)

    def help(self, progress: Progress | None) -> None:
        """Measure this process's share of what the first one stores; hidden states before the first block are computed again."""
        first = processes.agreed(0)
        with torch.inference_mode():
            for block in range(first) if self._runner.chained else ():
                for batch in range(self.batches):
                    self._run_batch(block, slice(batch * self.config.batch_size, (batch + 1) * self.config.batch_size))
                self._hidden.advance(block)
        for results in self.run_from(first, progress):
            self._hidden.forget(min(results) - 1)

    def store_blocks(self, progress: Progress | None) -> None:
        """Run the blocks that ``folder`` does not have, from the hidden states that it keeps; each block goes there at once."""
        assert self.folder is not None
        done = finished_blocks(self.folder, "inputs")
        first = processes.agreed(next((block for block in range(self.blocks) if block not in done), self.blocks))
        if self._runner.chained and 0 < first < self.blocks:
            self._hidden.resume(first - 1)
        began = time.perf_counter()
        for results in self.run_from(first, progress):
            seconds = (time.perf_counter() - began) / len(results)
            for block, result in results.items():
                path = block_path(self.folder, "inputs", block)
                write_block(path, result.inputs, seconds, influence=result.influence, note=self.note)
            self._hidden.forget(min(results) - 1)
            began = time.perf_counter()


def _complete(influence: Sequence[float | None]) -> tuple[float, ...]:
    """Return the influence of the blocks; empty if one has none."""
    known = tuple(value for value in influence if value is not None)
    return known if len(known) == len(influence) else ()


def collect_statistics(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, progress: Progress | None = None
) -> LayerStatistics:
    """Run the model over ``windows``, block by block if it can be; return the moments of every input of its compressible layers, in memory.

    The same model, windows and config give bit-equal results on one machine. ``progress`` counts blocks times batches.

    Raises:
        NumericalError: an input or a hidden state holds NaN or Inf; names the layer or the block.
        ModelError: the model has nothing to compress, the windows do not fit it, the covariances do not fit in memory, or a layer does
            not see every token.
        ConfigError: too few groups of windows for trimmed pooling.
    """
    calibration = _Calibration(handle, windows, config)
    calibration.check_memory()
    began = time.perf_counter()
    results = [result for part in calibration.run_from(0, progress) for result in part.values()]
    inputs = {group: statistics for result in results for group, statistics in result.inputs.items()}
    influence = _complete([result.influence for result in results])
    notes = (calibration.note,) if calibration.note else ()
    return LayerStatistics(inputs, config, time.perf_counter() - began, influence=influence, notes=notes)


def statistics_key(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig) -> str:
    """Return the name of these statistics: a hash of model, tokens, layers with the input that each reads, and config.

    Neither the batch size nor what gradients use is in it; nor is the context, which ``statistics_folder`` adds.
    """
    layers = sorted((layer.name, layer.input_group) for layer in handle.layers)
    parts = [_FORMAT, handle.fingerprint, windows.sha256, config.group_size, config.group_weights, config.robust, layers]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def inputs_folder(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, store: Path) -> Path:
    """Return where ``store`` keeps these statistics."""
    return statistics_folder(store, rounded(statistics_key(handle, windows, config), config, handle), windows.context)


def cached_statistics(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, store: Path, *, progress: Progress | None = None
) -> tuple[LayerStatistics, bool]:
    """Return the statistics, and whether ``store`` had them; new ones are kept there block by block, named by their content.

    Memory holds the model and one block's moments; hidden states are in a mapped file. An interrupted calibration goes on after its
    last finished block, with the same bits. Where another process is at the same one, this one waits, and takes its result.

    Raises:
        as ``collect_statistics``; NumericalError also where the stored ones are damaged.
    """
    folder = inputs_folder(handle, windows, config, store)
    if not processes.is_first():
        return _helped(handle, windows, config, folder, progress)
    stored = load_statistics(folder, config)
    if stored is not None:
        processes.agreed(True)
        return stored, True
    calibration = _Calibration(handle, windows, config, folder)
    calibration.check_memory()

    def waiting() -> None:
        if progress is not None:
            progress(calibration.stored_blocks * calibration.batches, calibration.total)

    with exclusive(folder, waiting):
        stored = load_statistics(folder, config)
        if processes.agreed(stored is not None):
            assert stored is not None
            return stored, True
        calibration.store_blocks(progress)
        finish(folder)
    processes.agreed(None)
    stored = load_statistics(folder, config)
    assert stored is not None
    return stored, False


def _helped(
    handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, folder: Path, progress: Progress | None
) -> tuple[LayerStatistics, bool]:
    """Help the first process, and return what it stored."""
    there = processes.agreed(False)
    if not there:
        with TemporaryDirectory() as scratch:
            _Calibration(handle, windows, config, Path(scratch)).help(progress)
        processes.agreed(None)
    stored = load_statistics(folder, config)
    assert stored is not None
    return stored, there


def load_statistics(folder: Path, config: CalibrationConfig) -> LayerStatistics | None:
    """Return the statistics in ``folder``, each input to be read when it is asked for; None if there are none, or not yet all.

    Raises:
        NumericalError: they are damaged.
    """
    if not is_finished(folder):
        return None
    inputs = StoredStatistics(folder, "inputs", InputStatistics)
    return LayerStatistics(inputs, config, inputs.seconds, influence=_complete(inputs.influence), notes=tuple(inputs.notes))

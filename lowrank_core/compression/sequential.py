"""Compression block by block: each matrix is fitted to the input that the compressed matrices before it really give.

Notation::

    x, x'    input of a layer in the dense and in the compressed model, on the same tokens
    μ        mean of x;  δ = x' - x;  S' and C× = E[x x'ᵀ]: covariances where the basis is centred, second moments else

Ranks are fixed before: a sequential basis decides directions, not budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from lowrank_core.allocation import RankAllocation, Ranks
from lowrank_core.compression.build import CompressedModel, build_model, low_rank_layers, swap_layers
from lowrank_core.decomposition.factorization import Damping, FactorBasis, column_metric, factorize_unit, refit_unit
from lowrank_core.decomposition.units import AnyBasis, Bases, operand_of
from lowrank_core.errors import ConfigError, ModelError, NumericalError
from lowrank_core.linalg import Damped
from lowrank_core.metrics import ErrorMetric, LayerData
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.experts import FIRST_LAYERS, Routed, UnrolledExperts
from lowrank_core.models.handle import ModelHandle
from lowrank_core.models.mapped import release
from lowrank_core.parameters import Unit
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.statistics.moments import BLOCK_ROWS, InputStatistics, add_gram, mirrored
from lowrank_core.statistics.pooling import token_weights
from lowrank_core.statistics.store import HiddenStates
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["CrossMoments", "DriftMoments", "compress_sequentially"]


@dataclass(frozen=True)
class CrossMoments:
    """Second moments of x and x' about a point, float64.

    Attributes:
        count: tokens.
        shift: the point c that both are counted from, (n,).
        mean, compressed_mean: E[x] and E[x'] (n,).
        absolute_mean: E|x'_j| (n,).
        own: E[(x' - c)(x' - c)ᵀ] (n, n);  cross: E[(x - c)(x' - c)ᵀ] (n, n).
    """

    count: int
    shift: Tensor
    mean: Tensor
    compressed_mean: Tensor
    absolute_mean: Tensor
    own: Tensor
    cross: Tensor

    def statistics(self) -> InputStatistics:
        """Return what ``InputStatistics`` says of x'; its pooled covariance is the plain one."""
        drift = self.compressed_mean - self.shift
        covariance = (self.own - torch.outer(drift, drift)) * self._unbiased
        one = torch.ones(1, dtype=torch.float64)
        return InputStatistics(
            count=self.count,
            mean=self.compressed_mean,
            absolute_mean=self.absolute_mean,
            pooled=covariance,
            sample=covariance,
            group_counts=one * self.count,
            group_weights=one,
            group_traces=covariance.trace().reshape(1),
            group_mean_shifts=one * 0,
        )

    def between(self, *, centred: bool) -> Tensor:
        """Return C× (n, n), normalised as ``statistics`` does."""
        left, right = self.mean - self.shift, self.compressed_mean - self.shift
        if centred:
            return (self.cross - torch.outer(left, right)) * self._unbiased
        return self.cross + torch.outer(self.shift, right) + torch.outer(left, self.shift) + torch.outer(self.shift, self.shift)

    @property
    def _unbiased(self) -> float:
        return self.count / max(self.count - 1, 1)


@dataclass(frozen=True)
class DriftMoments:
    """Moments of the drift δ = x' - x of the tokens that both models were run on, float64.

    Attributes:
        count: tokens.
        shift: the point c that x is counted from, (n,).
        mean, dense_mean: E[δ] and E[x] (n,).
        magnitude: E[|x'_j| - |x_j|] (n,).
        whole: whether these are all tokens that the dense model was run on.
        own: E[δ δᵀ] (n, n);  cross: E[(x - c) δᵀ] (n, n): where they are whole, of x' - c instead of δ. The dense model's statistics may be
            of bfloat16 products, and what is left of a direction that x' lacks is then nothing, and not a difference of two roundings.
    """

    count: int
    shift: Tensor
    mean: Tensor
    dense_mean: Tensor
    magnitude: Tensor
    own: Tensor
    cross: Tensor
    whole: bool = False

    def among(self, dense: InputStatistics, *, prior: int = 0) -> CrossMoments:
        """Return the moments over all tokens of ``dense``: those that only the dense model was run on count as tokens without drift.

        The share that was run bounds how far the regression of x on x' goes: docs/results.md has what that is worth.

        Args:
            dense: of calibration windows, those of the drift among them.
            prior: further tokens of the dense model's distribution without drift.
        """
        moment = dense.moment_about(self.shift)
        share = min(1.0, self.count / max((self.count if self.whole else dense.count) + prior, 1))
        if self.whole:
            own, cross = torch.lerp(moment, self.own, share), torch.lerp(moment, self.cross, share)
        else:
            drift = share * self.cross
            own, cross = moment + drift + drift.T + share * self.own, moment + drift
        mean = torch.lerp(dense.mean, self.dense_mean, share) if self.whole else dense.mean
        return CrossMoments(
            dense.count, self.shift, mean, mean + share * self.mean, dense.absolute_mean + share * self.magnitude, own, cross
        )


class _DriftAccumulator:
    """Adds rows of x and x' in float32 blocks, sums them in float64."""

    def __init__(self, mean: Tensor, device: torch.device, *, whole: bool) -> None:
        """Count from the dense ``mean``, rounded to float32; ``whole``: the rows are all that the dense model was run on."""
        width = mean.numel()
        self._whole = whole
        self._shift = mean.to(device, torch.float32)
        self._count, self._weight = 0, 0.0
        self._mean, self._offset, self._magnitude = (torch.zeros(width, dtype=torch.float64, device=device) for _ in range(3))
        self._own, self._cross = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, dense: Tensor, compressed: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (..., n) of both models, weighed by ``weights`` (N,) as the dense model's statistics are."""
        rows, drifted = dense.flatten(0, -2).to(torch.float32), compressed.flatten(0, -2).to(torch.float32)
        weights = torch.ones(len(rows), device=rows.device) if weights is None else weights.to(torch.float32)
        self._count += len(rows)
        self._weight += float(weights.sum(dtype=torch.float64))
        for start in range(0, len(rows), BLOCK_ROWS):
            span = slice(start, start + BLOCK_ROWS)
            scale = weights[span, None]
            drift = drifted[span] - rows[span]
            self._mean += (drift * scale).sum(0, dtype=torch.float64)
            self._magnitude += ((drifted[span].abs() - rows[span].abs()) * scale).sum(0, dtype=torch.float64)
            centred = rows[span] - self._shift
            self._offset += (centred * scale).sum(0, dtype=torch.float64)
            counted = drifted[span] - self._shift if self._whole else drift
            add_gram(self._own, counted * scale.sqrt())
            self._cross += centred.T @ (counted * scale)

    def finish(self) -> DriftMoments:
        weight = self._weight or 1.0  # no token reached the expert: all sums are zero
        sums = (self._mean, self._offset, self._magnitude, mirrored(self._own), self._cross)
        mean, offset, magnitude, own, cross = (total.cpu() / weight for total in sums)
        shift = self._shift.cpu().to(torch.float64)
        return DriftMoments(self._count, shift, mean, shift + offset, magnitude, own, cross, self._whole)


class _Read(Exception):
    """Ends a forward pass that need go no further."""


@contextmanager
def _reading(module: nn.Module, *, stop: bool) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collect what ``module`` is given; ``stop``: the pass ends there."""
    read: list[tuple[Tensor, ...]] = []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        read.append(module.bound(arguments, options) if isinstance(module, UnrolledExperts) else arguments)
        if stop:
            raise _Read

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


class _Pair:
    """The dense model, and the same with the layers that are compressed so far: both at the same block, one module for the two.

    Attributes:
        layers: compressed so far, by name.
    """

    def __init__(self, handle: ModelHandle, windows: WindowSet, statistics: LayerStatistics, folder: Path | None) -> None:
        """Take the tokens; hidden states are kept under ``folder``, in memory without one."""
        calibration, first = statistics.config, min(shape.depth for shape in handle.shapes)
        groups = {shape.input_group for shape in handle.shapes if shape.depth == first}  # each is read from disk when it is asked for
        self._whole = windows.ids.numel() >= max(statistics.inputs[group].count for group in groups)
        self._handle, self._runner = handle, BlockRunner(handle)
        self._downweighted, batch_size = calibration.robust == "downweighted", calibration.batch_size
        self._batches = [ids.to(handle.device) for ids in torch.split(windows.ids, batch_size)]
        self._spans = [slice(start, start + batch_size) for start in range(0, windows.windows, batch_size)]
        places = [None, None] if folder is None else [folder / "dense", folder / "compressed"]
        for place in filter(None, places):
            place.mkdir()
        self._dense, self._working = (HiddenStates(windows.windows, place) for place in places)
        self.layers: dict[str, nn.Module] = {}
        self._in_place: dict[str, nn.Module] = {}
        self._dense_past = -1

    @property
    def batches(self) -> int:
        return len(self._batches)

    def add(self, bases: Bases, ranks: Ranks) -> None:
        """Count units of the block under way as compressed; passes run plain factors, which are the same function and faster."""
        self.layers |= low_rank_layers(self._handle, bases, ranks)
        self._in_place |= low_rank_layers(self._handle, bases, ranks, storage="factored")

    def moments(
        self, step: _Step, inputs: Mapping[str, InputStatistics], tick: Callable[[], None], *, last: bool
    ) -> dict[str, CrossMoments]:
        """Return the moments of the inputs of a step, by input group, in both models; none where they can't be compared row by row.

        At the ``last`` step of a chained block the dense model goes on to its end.

        Args:
            inputs: of the dense model, which the moments are among; few tokens reach an expert, so n more count as tokens without drift.
        """
        path = step.mixture or next(iter(step.groups))
        module = self._handle.module.get_submodule(path)
        if isinstance(module, UnrolledExperts) and not module.tells_rows:
            return {}
        accumulators = {group: _DriftAccumulator(entry.mean, self._handle.device, whole=self._whole) for group, entry in inputs.items()}
        with torch.inference_mode():
            for index in range(self.batches):
                dense = self._read(module, step, index, advance=last and self._runner.chained)
                if isinstance(module, UnrolledExperts):
                    self._update_experts(module, step, dense, index, accumulators)
                else:
                    with swap_layers(self._handle, self._in_place):
                        compressed = self._read(module, step, index, compressed=True)[0]
                    windows = dense[0].reshape(len(self._batches[index]), -1, dense[0].shape[-1])
                    accumulators[path].update(windows, compressed, self._weights(windows))
                tick()
        self._dense_past = step.depth if last else self._dense_past
        results = {}
        for group in step.groups:
            drift = accumulators.pop(group).finish()
            if not torch.isfinite(drift.own).all() or not torch.isfinite(drift.cross).all():
                raise NumericalError(
                    f"{group}: its input holds NaN or Inf in the model compressed so far. Keep more ranks, or run in float32."
                )
            results[group] = drift.among(inputs[group], prior=inputs[group].width if step.mixture else 0)
        return results

    def _update_experts(
        self,
        mixture: UnrolledExperts,
        step: _Step,
        given: tuple[Tensor, ...],
        index: int,
        accumulators: Mapping[str, _DriftAccumulator],
    ) -> None:
        """Add what the experts of a step read in both models, at the tokens that the dense model routes to each."""
        routing = mixture.routing(*given)
        dense = _inputs_of_experts(mixture, step, routing, given)
        with swap_layers(self._handle, self._in_place):
            compressed = _inputs_of_experts(mixture, step, routing, self._read(mixture, step, index, compressed=True))
            for (group, number, rows), (_, _, drifted) in zip(dense, compressed, strict=True):
                weights = routing[number].weights.to(torch.float32).square()
                robust = self._weights(rows[None]) if len(rows) else None
                accumulators[group].update(rows, drifted, weights if robust is None else weights * robust)

    def _weights(self, windows: Tensor) -> Tensor | None:
        """Return the weights of the tokens (B T,) of windows (B, T, n) in the statistics of the dense model; None where all count alike."""
        return token_weights(windows).flatten() if self._downweighted else None

    def _read(self, module: nn.Module, step: _Step, index: int, *, compressed: bool = False, advance: bool = False) -> tuple[Tensor, ...]:
        """Return what ``module`` is given in a batch of the dense model, or of the compressed one whose layers are in place.

        Args:
            advance: the pass goes on to the end of the block, whose hidden states are kept.
        """
        states = self._working if compressed else self._dense
        with _reading(module, stop=not advance) as read, suppress(_Read):
            hidden = self._runner.run(step.depth, self._batches[index], states.read(self._spans[index]))
            if advance:
                states.write(self._spans[index], hidden)
        if not read:
            raise ModelError(
                f"block {step.depth} is run without the layer whose input was asked for, so the model can't be compressed block by block."
            )
        return read[0]

    def advance(self, block: int, tick: Callable[[], None]) -> None:
        """Take both models past ``block``, where blocks can be chained; else every pass begins with the tokens."""
        for index in range(self.batches):
            if self._runner.chained:
                self._advance(block, index)
            tick()
        if self._runner.chained:
            for states in (self._dense, self._working):
                states.advance(block)
                states.forget(block - 1)
        release(self._handle.module)
        self._in_place = {} if self._runner.chained else self._in_place

    @torch.inference_mode()
    def _advance(self, block: int, index: int) -> None:
        ids, span = self._batches[index], self._spans[index]
        if self._dense_past < block:
            hidden = self._runner.run(block, ids, self._dense.read(span))
            self._dense.write(span, hidden)
        if self.layers:
            with swap_layers(self._handle, self._in_place):
                hidden = self._runner.run(block, ids, self._working.read(span))
        self._working.write(span, hidden)


def _inputs_of_experts(
    mixture: UnrolledExperts, step: _Step, routing: Sequence[Routed], given: tuple[Tensor, ...]
) -> list[tuple[str, int, Tensor]]:
    """Return input group, number of the expert and rows of each input of a step."""
    result = []
    for group, units in step.groups.items():
        number = units[0].members[0].expert
        assert number is not None
        rows = mixture.inputs(number, routing[number], *given)
        inner = group.rpartition(".")[2] not in FIRST_LAYERS
        result.append((group, number, mixture.intermediate(mixture.experts[number], rows) if inner else rows))
    return result


@dataclass(frozen=True)
class _Step:
    """Inputs that are measured in one pass, with the compressed units that read them: a layer's, or that of all experts of a mixture.

    Attributes:
        depth: of the block.
        mixture: dotted path of the mixture; empty outside one.
        groups: by input group; of experts, all of them the first layers' or all the last one's.
    """

    depth: int
    mixture: str
    groups: dict[str, list[Unit]]


def _steps(units: Sequence[Unit], allocation: RankAllocation) -> list[_Step]:
    """Return the steps over the inputs that first members of compressed units read, in the order of the model."""
    result: dict[object, _Step] = {}
    for unit in units:
        first = unit.members[0]
        if allocation.ranks.get(unit.name) is not None:
            mixture, _, layer = first.mixture.rpartition(".")
            key = (mixture, layer in FIRST_LAYERS) if mixture else first.input_group
            result.setdefault(key, _Step(first.depth, mixture, {})).groups.setdefault(first.input_group, []).append(unit)
    return list(result.values())


def compress_sequentially(
    handle: ModelHandle,
    windows: WindowSet,
    statistics: LayerStatistics,
    bases: Bases,
    allocation: RankAllocation,
    basis: ErrorMetric,
    *,
    damping: Damping,
    progress: Progress | None = None,
) -> CompressedModel:
    """Compress at the ranks of ``allocation``, every unit fitted to the drifted input of its calibration tokens.

    Args:
        windows: the calibration windows of ``statistics``.
        bases: decompositions of the same units with the dense statistics; per-head units are taken from them as they are.
        basis: a sequential basis.

    Raises:
        ConfigError: a stack spans inputs, which no single drift describes.
        NumericalError: NaN or Inf; names the layer.
    """
    units = [base.unit for base in bases.values()]
    for unit in units:
        inputs = {member.input_group for member in unit.members}
        if isinstance(bases[unit.name], FactorBasis) and len(inputs) > 1:
            raise ConfigError(
                f"{unit.name}: a stack over several inputs can't be drift-aware. Use a stack of one input, or drop drift_aware."
            )
    steps = _steps(units, allocation)
    depth = max(shape.depth for shape in handle.shapes) + 1
    batches = -(-windows.windows // statistics.config.batch_size)
    total, done = (len(steps) + depth) * batches, 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with _room_for_states(handle) as folder:
        pair = _Pair(handle, windows, statistics, folder)
        for block in range(depth):
            here = [step for step in steps if step.depth == block]
            for step in here:
                moments = pair.moments(step, {group: statistics.inputs[group] for group in step.groups}, tick, last=step is here[-1])
                fitted = _fitted_step(step, handle, statistics, moments, bases, basis, damping, allocation.ranks)
                pair.add(fitted, {name: allocation.ranks[name] for name in fitted})
            pair.advance(block, tick)
    return build_model(handle, pair.layers, bases, allocation.ranks)


@contextmanager
def _room_for_states(handle: ModelHandle) -> Iterator[Path | None]:
    """Give a folder for hidden states where weights don't fit into memory; None where memory has room for both."""
    if handle.weights is None:
        yield None
        return
    with TemporaryDirectory(dir=handle.weights.folder) as folder:
        yield Path(folder)


def _fitted_step(
    step: _Step,
    handle: ModelHandle,
    statistics: LayerStatistics,
    moments: Mapping[str, CrossMoments],
    bases: Bases,
    basis: ErrorMetric,
    damping: Damping,
    ranks: Ranks,
) -> dict[str, AnyBasis]:
    """Return the factors of the units of a step; units that read one input share its damped metric."""
    result: dict[str, AnyBasis] = {}
    for group, units in step.groups.items():
        columns: Damped | None = None
        for unit in units:
            given, rank = bases[unit.name], ranks[unit.name]
            result[unit.name] = given
            if group in moments and isinstance(given, FactorBasis) and rank is not None:
                operands = _operands(unit, handle, statistics, moments[group], basis)
                columns = columns or column_metric([basis.metric(operands[0])], damping, unit.name)
                result[unit.name] = (
                    refit_unit(unit, operands, basis, damping, given.slice(rank), columns)
                    if basis.refit_steps
                    else factorize_unit(unit, operands, basis, damping, columns)
                )
    return result


def _operands(unit: Unit, handle: ModelHandle, statistics: LayerStatistics, moments: CrossMoments, basis: ErrorMetric) -> list[LayerData]:
    """Return the members of a unit with the inputs of the compressed model."""
    own, cross = moments.statistics(), moments.between(centred=basis.centred)
    return [replace(operand_of(handle, statistics, member), inputs=own, cross=cross, dense_mean=moments.mean) for member in unit.members]

"""Compression block by block: each matrix is fitted to the input that the compressed matrices before it really give.

Notation::

    x, x'    input of a layer in the dense and in the compressed model, on the same tokens
    μ, μ'    their means;  S' and C× = E[x x'ᵀ]: covariances where the basis is centred, second moments else

Ranks are fixed before: a sequential basis decides directions, not budgets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank_core.allocation import RankAllocation
from lowrank_core.compression.build import CompressedModel, build_model, low_rank_layers
from lowrank_core.decomposition.factorization import Damping, FactorBasis, factorize_unit, refit_unit
from lowrank_core.decomposition.units import Bases, operand_of
from lowrank_core.errors import ConfigError, ModelError, NumericalError
from lowrank_core.metrics import ErrorMetric
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.experts import FIRST_LAYERS, UnrolledExperts
from lowrank_core.models.handle import ModelHandle
from lowrank_core.models.unrolled import replace_module
from lowrank_core.parameters import Unit
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.statistics.moments import InputStatistics
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["CrossMoments", "compress_sequentially"]


@dataclass(frozen=True)
class CrossMoments:
    """Second moments of x and x' about the dense mean, float64.

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
        covariance = (self.own - torch.outer(drift, drift)) * (self.count / (self.count - 1))
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

    def with_tokens_of(self, dense: InputStatistics) -> CrossMoments:
        """Return the moments with n tokens of the dense model's distribution added, whose x' are their x: an expert may see few."""
        added = dense.width / (self.count + dense.width)
        square = dense.moment_about(self.shift)

        def mixed(own: Tensor, prior: Tensor) -> Tensor:
            return torch.lerp(own, prior, added)

        return CrossMoments(
            self.count + dense.width,
            self.shift,
            mixed(self.mean, dense.mean),
            mixed(self.compressed_mean, dense.mean),
            mixed(self.absolute_mean, dense.absolute_mean),
            mixed(self.own, square),
            mixed(self.cross, square),
        )

    def between(self, *, centred: bool) -> Tensor:
        """Return C× (n, n), normalised as ``statistics`` does."""
        left, right = self.mean - self.shift, self.compressed_mean - self.shift
        if centred:
            return (self.cross - torch.outer(left, right)) * (self.count / (self.count - 1))
        return self.cross + torch.outer(self.shift, right) + torch.outer(left, self.shift) + torch.outer(self.shift, self.shift)


class _CrossAccumulator:
    """Adds rows of x and x' in float32 blocks, sums them in float64."""

    def __init__(self, shift: Tensor, device: torch.device) -> None:
        width = shift.numel()
        self._shift = shift.to(device)
        self._count, self._weight = 0, 0.0
        self._sums = [torch.zeros(width, dtype=torch.float64, device=device) for _ in range(3)]
        self._own, self._cross = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, dense: Tensor, compressed: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (..., n) of both models; those of an expert are weighed by ``weights`` (N,)."""
        rows, own = dense.flatten(0, -2).to(torch.float32), compressed.flatten(0, -2).to(torch.float32)
        scale = None if weights is None else weights.to(torch.float32)[:, None]
        shift = self._shift.to(torch.float32)
        self._count += len(rows)
        self._weight += len(rows) if scale is None else float(scale.sum(dtype=torch.float64))
        for total, part in zip(self._sums, (rows, own, own.abs()), strict=True):
            total += (part if scale is None else part * scale).sum(0, dtype=torch.float64)
        rows, own = rows - shift, own - shift
        weighed = own if scale is None else own * scale
        for start in range(0, len(rows), 1024):
            part = weighed[start : start + 1024]
            self._own += own[start : start + 1024].T @ part
            self._cross += rows[start : start + 1024].T @ part

    def finish(self) -> CrossMoments:
        weight = self._weight or 1.0  # no token reached the expert: all sums are zero
        means = [total.cpu() / weight for total in self._sums]
        shift, own, cross = self._shift.cpu(), self._own.cpu() / weight, self._cross.cpu() / weight
        return CrossMoments(self._count, shift, means[0], means[1], means[2], own, cross)


class _Read(Exception):
    """Carries what a module is given out of a forward pass that need go no further."""

    def __init__(self, arguments: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.arguments = arguments


@contextmanager
def _stopping_at(module: nn.Module) -> Iterator[None]:
    def stop(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        raise _Read(module.bound(arguments, options) if isinstance(module, UnrolledExperts) else arguments)

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _read(runner: BlockRunner, block: int, ids: Tensor, hidden: Tensor | None) -> tuple[Tensor, ...]:
    """Return what the module is given at which the pass is stopped."""
    try:
        runner.run(block, ids, hidden)
    except _Read as read:
        return read.arguments
    raise ModelError(f"block {block} is run without the layer whose input was asked for, so the model can't be compressed block by block.")


class _Pair:
    """The dense model and its copy that is being compressed, both at the same block."""

    def __init__(self, dense: ModelHandle, windows: WindowSet, batch_size: int) -> None:
        module = copy.deepcopy(dense.module)
        self.working = ModelHandle(dense.reference, module, dense.tokenizer, dense.layers, dense.stored_dtype)
        self.dense = dense
        self._runners = (BlockRunner(dense), BlockRunner(self.working))
        self._batches = [ids.to(dense.device) for ids in torch.split(windows.ids, batch_size)]
        self._states: tuple[list[Tensor | None], list[Tensor | None]] = ([None] * len(self._batches), [None] * len(self._batches))

    @property
    def batches(self) -> int:
        return len(self._batches)

    def moments(self, step: _Step, inputs: Mapping[str, InputStatistics], tick: Callable[[], None]) -> dict[str, CrossMoments]:
        """Return the moments of the inputs of a step, by input group, in both models; none where they can't be compared row by row.

        Args:
            inputs: of the dense model, whose means are the points that moments are counted from; few tokens reach an expert, so its
                moments are mixed with these.
        """
        path = step.mixture or next(iter(step.groups))
        modules = [handle.module.get_submodule(path) for handle in (self.dense, self.working)]
        if isinstance(modules[0], UnrolledExperts) and not modules[0].tells_rows:
            return {}
        accumulators = {group: _CrossAccumulator(entry.mean, self.dense.device) for group, entry in inputs.items()}
        with ExitStack() as stack, torch.inference_mode():
            for module in modules:
                stack.enter_context(_stopping_at(module))
            for index, ids in enumerate(self._batches):
                reads = [_read(runner, step.depth, ids, states[index]) for runner, states in zip(self._runners, self._states, strict=True)]
                if step.mixture:
                    _update_experts(step, modules, reads, accumulators)
                else:
                    accumulators[path].update(reads[0][0], reads[1][0])
                tick()
        results = {group: accumulators.pop(group).finish() for group in step.groups}
        for group, result in results.items():
            if not torch.isfinite(result.own).all() or not torch.isfinite(result.cross).all():
                raise NumericalError(
                    f"{group}: its input holds NaN or Inf in the model compressed so far. Keep more ranks, or run in float32."
                )
        return {group: result.with_tokens_of(inputs[group]) for group, result in results.items()} if step.mixture else results

    def advance(self, block: int, tick: Callable[[], None]) -> None:
        """Take both models past ``block``, where blocks can be chained; else every pass begins with the tokens."""
        for index, ids in enumerate(self._batches):
            with torch.inference_mode():
                for runner, states in zip(self._runners, self._states, strict=True):
                    if runner.chained:
                        states[index] = runner.run(block, ids, states[index])
            tick()


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


def _update_experts(
    step: _Step, modules: Sequence[nn.Module], reads: Sequence[tuple[Tensor, ...]], accumulators: Mapping[str, _CrossAccumulator]
) -> None:
    """Add what the experts of a step read in both models, at the tokens that the dense model routes to each."""
    dense, working = modules
    assert isinstance(dense, UnrolledExperts)
    assert isinstance(working, UnrolledExperts)
    routing = dense.routing(*reads[0])
    for group, units in step.groups.items():
        number = units[0].members[0].expert
        assert number is not None
        own, drifted = (mixture.inputs(number, routing[number], *read) for mixture, read in zip((dense, working), reads, strict=True))
        if group.rpartition(".")[2] not in FIRST_LAYERS:
            own, drifted = dense.intermediate(dense.experts[number], own), working.intermediate(working.experts[number], drifted)
        accumulators[group].update(own, drifted, routing[number].weights.square())


def compress_sequentially(
    handle: ModelHandle,
    windows: WindowSet,
    statistics: LayerStatistics,
    bases: Bases,
    allocation: RankAllocation,
    basis: ErrorMetric,
    *,
    damping: Damping,
    batch_size: int = 8,
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
    pair = _Pair(handle, windows, batch_size)
    steps = _steps(units, allocation)
    depth = max(shape.depth for shape in handle.shapes) + 1
    total, done = (len(steps) + depth) * pair.batches, 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    layers: dict[str, nn.Module] = {}
    for block in range(depth):
        for step in (step for step in steps if step.depth == block):
            moments = pair.moments(step, {group: statistics.inputs[group] for group in step.groups}, tick)
            fitted = {}
            for unit in (unit for members in step.groups.values() for unit in members):
                measured, rank = moments.get(unit.members[0].input_group), allocation.ranks[unit.name]
                fitted[unit.name] = (
                    bases[unit.name] if measured is None else _fitted(unit, handle, statistics, measured, bases, basis, damping, rank)
                )
            built = low_rank_layers(handle, fitted, {name: allocation.ranks[name] for name in fitted})
            layers |= built
            for name, layer in built.items():
                replace_module(pair.working.module, name, layer)
        pair.advance(block, tick)
    return build_model(handle, layers, bases, allocation.ranks)


def _fitted(
    unit: Unit,
    handle: ModelHandle,
    statistics: LayerStatistics,
    moments: CrossMoments,
    bases: Bases,
    basis: ErrorMetric,
    damping: Damping,
    rank: int | None,
) -> FactorBasis:
    given = bases[unit.name]
    if not isinstance(given, FactorBasis):
        return given  # type: ignore[return-value]
    own, cross = moments.statistics(), moments.between(centred=basis.centred)
    operands = [
        replace(operand_of(handle, statistics, member), inputs=own, cross=cross, dense_mean=moments.mean) for member in unit.members
    ]
    if basis.refit_steps and rank is not None:
        return refit_unit(unit, operands, basis, damping, given.slice(rank))
    return factorize_unit(unit, operands, basis, damping)

"""The search space: one variable for each group of matrices, and what a point of it allocates.

``kept``: a point is a vector x of kept fractions in [LEAST, 1]. Projected, only their ratios matter: they are scaled so that the
budget is spent exactly, and every trial is feasible. As published (``studies.published``), they are the kept fractions themselves, and
only points that meet the budget are drawn.

``errors``: a point is a vector of weights w in [1/SPREAD, SPREAD] on the errors of the units, and the allocator ``lagrangian`` minimises
Σ w_i e_i(r_i) within the budget: at w = 1 the point is its own allocation, and a search starts there. Only ratios matter, so the group
with the most parameters has weight 1 and no variable. A stack has the mean weight of its members (geometric, by parameters).

By depth, the weights are those of a depth bias (``allocation.lems``), 1 + γ h_b(α): two variables, and γ = 0 is the allocator's own point.

Groups: module types (q and k together), shared by depth or in groups of consecutive blocks, or every unit by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from optuna.distributions import FloatDistribution

from lowrank_core.allocation import (
    ALLOCATORS,
    AllocationProblem,
    ByMultipliers,
    DepthBias,
    ErrorCurves,
    RankAllocation,
    Ranks,
    allocate,
    allocation_from_ranks,
    allocator_named,
    module_group,
    project,
    round_down,
    round_ranks_down,
)
from lowrank_core.config import DEPTH, SearchConfig, depth_groups
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.studies.depth_trials import ALPHA, GAMMA, VARIABLES
from lowrank_core.studies.published import MAX, MIN, PublishedScheme, published_rank

__all__ = ["BASELINES", "RATIO", "SPREAD", "WEIGHTED", "Baseline", "SearchSpace"]

SPREAD = 2.0

RATIO = "compression_ratio"
"""Variable of a search over a range of ratios."""

WEIGHTED = ALLOCATORS["lagrangian"]
"""Allocator that turns a point of error weights into ranks."""

BASELINES = ("uniform", "lord_manual", "lagrangian")
"""Allocators that are enqueued as the first trials, so that the result is never worse than any of them."""

_RATIOS_OF_BASELINES = 5
_MAX_GP_VARIABLES = 30


@dataclass(frozen=True)
class Baseline:
    """An allocator as a trial: a point of the space if possible, else its ranks.

    Attributes:
        label: name of the allocator.
        point: variable -> value; empty where it is no point.
        ranks: unit -> rank; None where it is a point.
        compression_ratio: that it is meant for.
        place: which of several with one label and ratio.
    """

    label: str
    point: Mapping[str, float]
    ranks: Ranks | None
    compression_ratio: float
    place: str = ""

    @property
    def key(self) -> str:
        """Key within its study."""
        return f"{self.place or self.label} {self.compression_ratio:.6f}"


@dataclass(frozen=True)
class SearchSpace:
    """Variables of a search and what a point of them means.

    Attributes:
        units: every compressible matrix, alone or in a stack, with the prices of the storage; alternatives only for ``errors``.
        compression_ratio: fraction of their parameters to remove.
        keep_dense: names of matrices that stay as they are.
        projected: whether a point of kept fractions is scaled onto the budget.
        rank_multiple: ranks are rounded down to a multiple of it.
        variables: ``kept`` or ``errors``.
        depth_groups: in how many groups of blocks a type has variables of its own; None for one of every unit.
        most_ratio: where the ratio is a variable, its largest value.
        curves: errors by unit; ``errors`` and the baseline ``lagrangian`` need them.
        by_depth: whether the variables are those of a depth bias, instead of one for each group.
    """

    units: tuple[Unit, ...]
    compression_ratio: float
    keep_dense: tuple[str, ...] = ()
    projected: bool = True
    rank_multiple: int = 1
    variables: str = "keep_ratio"
    depth_groups: int | None = 1
    max_ratio: float | None = None
    curves: ErrorCurves | None = None
    by_depth: bool = False

    @classmethod
    def of(cls, units: tuple[Unit, ...], config: SearchConfig, keep_dense: tuple[str, ...], curves: ErrorCurves | None) -> SearchSpace:
        """Return the space that ``config`` asks for.

        Raises:
            ConfigError: there is nothing to search over, there are fewer blocks than groups, or more variables than the sampler takes;
                or it can't search as published.
            BudgetError: no point as published meets the budget.
        """
        space = cls(
            units,
            config.compression_ratio,
            keep_dense,
            config.projected,
            config.compression.rank_multiple,
            config.variables,
            depth_groups(config.space),
            config.max_ratio,
            curves,
            config.space == DEPTH,
        )
        count = len(space.distributions())
        config.check_sampler()
        _ = space.scheme  # a budget that no point meets is reported here
        if config.sampler == "gp" and count > _MAX_GP_VARIABLES:
            raise ConfigError(
                f"the space {config.space} has {count} variables here, and a Gaussian process works up to {_MAX_GP_VARIABLES}. "
                "Choose the sampler tpe or cmaes, or a space with fewer variables."
            )
        return space

    @cached_property
    def _free(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if not any(member.name in self.keep_dense for member in unit.members))

    @cached_property
    def _blocks(self) -> int:
        return 1 + max(member.depth for unit in self.units for member in unit.members)

    def _group(self, kind: str, depth: int, name: str) -> str:
        if self.depth_groups is None:
            return name
        if self.depth_groups == 1:
            return module_group(kind)
        if self.depth_groups > self._blocks:
            raise ConfigError(f"the model has {self._blocks} blocks; choose a space with at most so many depth groups.")
        mine = [block for block in range(self._blocks) if block * self.depth_groups // self._blocks == self._depth_group(depth)]
        return f"{module_group(kind)} {mine[0]}-{mine[-1]}"

    def _depth_group(self, depth: int) -> int:
        return depth * (self.depth_groups or 1) // self._blocks

    def group_of(self, part: Unit | MatrixShape) -> str:
        """Return the group of a unit, or of a matrix, whether it has a variable or not."""
        return self._group(part.kind, part.depth, part.name)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in the order of the model."""
        if self.variables == "keep_ratio":
            return tuple(dict.fromkeys(self.group_of(unit) for unit in self._free))
        return tuple(dict.fromkeys(self.group_of(matrix) for matrix in self._matrices))

    @cached_property
    def _matrices(self) -> tuple[MatrixShape, ...]:
        return tuple({member.name: member for unit in self._free for member in unit.members}.values())

    @cached_property
    def _reference(self) -> str:
        """The group whose weight is 1."""
        sizes = dict.fromkeys(self.groups, 0)
        for matrix in self._matrices:
            sizes[self.group_of(matrix)] += matrix.dense_parameters
        return max(sizes, key=sizes.__getitem__)

    def distributions(self) -> dict[str, FloatDistribution]:
        """Return the variables for Optuna.

        Raises:
            ConfigError: nothing is left to search over, or there are fewer blocks than depth groups.
        """
        if not self.groups:
            raise ConfigError("search: every matrix is kept dense; let the value projections be compressed, too.")
        if self.by_depth and self._blocks == 1:
            raise ConfigError("search: a model of one block has no depth to weigh by; choose another space.")
        if self.by_depth:
            result: dict[str, FloatDistribution] = dict(VARIABLES)
        elif self.variables == "keep_ratio":
            maximum = 1.0 if self.projected else MAX
            result = {group: FloatDistribution(MIN, maximum) for group in self.groups}
        else:
            result = {g: FloatDistribution(1 / SPREAD, SPREAD, log=True) for g in self.groups if g != self._reference}
        if self.max_ratio is not None:
            result[RATIO] = FloatDistribution(self.compression_ratio, self.max_ratio)
        if not result:
            raise ConfigError("search: one group of matrices has nothing to be weighed against; choose a space with more groups.")
        return result

    @cached_property
    def scheme(self) -> PublishedScheme | None:
        """Scheme of a published search; None for projected points.

        Raises:
            BudgetError: no point meets the budget.
        """
        if self.projected:
            return None
        groups = {group: [unit for unit in self._free if self.group_of(unit) == group] for group in self.groups}
        dense = [unit for unit in self.units if unit not in self._free]
        return PublishedScheme.of(groups, dense, self.compression_ratio)

    def problem(self, compression_ratio: float | None = None) -> AllocationProblem:
        """Return what is to be shared out, at the ratio of the search unless another is given."""
        ratio = self.compression_ratio if compression_ratio is None else compression_ratio
        return AllocationProblem(self.units, ratio, frozenset(self.keep_dense), self.curves)

    def allocation(self, point: Mapping[str, float], label: str = "sampled") -> RankAllocation:
        """Return the ranks at ``point`` (variable -> value).

        Raises:
            BudgetError: the ratio can't be met.
        """
        ratio = point.get(RATIO, self.compression_ratio)
        if self.variables == "error_weight":
            result = allocate(
                WEIGHTED.name, self.units, ratio, keep_dense=self.keep_dense, curves=self.curves, weights=dict(self._weights(point))
            )
            return replace(round_ranks_down(result, self.units, self.rank_multiple), label=label, allocator="")
        targets = {unit.name: point.get(self.group_of(unit), 1.0) for unit in self.units}
        ranks = project(self.problem(ratio), targets) if self.projected else self._published(targets)
        return round_ranks_down(allocation_from_ranks(label, self.units, ranks), self.units, self.rank_multiple)

    def _weights(self, point: Mapping[str, float]) -> Iterator[tuple[str, float]]:
        if self.by_depth:
            bias = DepthBias(point.get(ALPHA, 0.0), point.get(GAMMA, 0.0))
            yield from bias.weights(self.units, {unit.name: 1.0 for unit in self._free}).items()
            return
        for unit in self._free:
            sizes = [member.dense_parameters for member in unit.members]
            logarithms = [math.log(point.get(self.group_of(member), 1.0)) for member in unit.members]
            yield unit.name, math.exp(sum(s * x for s, x in zip(sizes, logarithms, strict=True)) / sum(sizes))

    def _published(self, kept: Mapping[str, float]) -> dict[str, int | None]:
        """Return the published code's rank, floored, for each unit; a kept fraction of 1 or more is dense."""
        ranks: dict[str, int | None] = {}
        for unit in self.units:
            dense = unit.name in self.keep_dense or kept[unit.name] >= 1
            ranks[unit.name] = None if dense else round_down(published_rank(unit, kept[unit.name]), self.rank_multiple)
        return ranks

    def baselines(self) -> tuple[Baseline, ...]:
        """Return what is measured first, best known last: the fixed rules, and ``lagrangian`` where the errors are known.

        Over a range of ratios, the rule that is a point of the space stands at several of them, the others at its ends. A search as
        published has none: it begins with points of its own, ``first_points``.

        Raises:
            BudgetError: the ratio can't be met.
        """
        if not self.projected:
            return ()
        names = [name for name in BASELINES if not ALLOCATORS[name].needs_curves or self.curves is not None]
        return tuple(result for name in names for result in self._baselines(name))

    def first_points(self, config: SearchConfig) -> tuple[Baseline, ...]:
        """Return the points that a search as published begins with; none where points are projected, or all are random.

        Raises:
            BudgetError: no point meets the budget.
        """
        if self.scheme is None or config.sampler == "random":
            return ()
        points = self.scheme.initial(config.startup_trials, config.seed)
        ratio = self.compression_ratio
        return tuple(Baseline("sampled", self.scheme.point(p), None, ratio, f"initial point {n}") for n, p in enumerate(points))

    def _baselines(self, name: str) -> Iterator[Baseline]:
        rule = ALLOCATORS[name]
        is_point = rule.trades_errors == (self.variables == "error_weight")
        for ratio in self._ratios(_RATIOS_OF_BASELINES if is_point and rule.neutral else 2):
            chosen = {RATIO: ratio} if self.max_ratio is not None else {}
            if is_point:
                yield Baseline(name, {**self.point_of(name, ratio), **chosen}, None, ratio)
                continue
            yield Baseline(name, {}, self.by_allocator(name, ratio).ranks, ratio)

    def by_allocator(
        self, name: str, compression_ratio: float, *, fixed: Ranks | None = None, influence: Sequence[float] = ()
    ) -> RankAllocation:
        """Return what the allocator ``name`` makes of the budget; one that can't choose between alternatives gets single matrices.

        Raises:
            ConfigError: no such allocator, or it lacks what it works from.
            BudgetError: the ratio can't be met.
        """
        fixed = fixed or {}
        units = (
            self.units if allocator_named(name).takes_alternatives else tuple(u for u in self.units if u.name in fixed or self._alone(u))
        )
        result = allocate(name, units, compression_ratio, keep_dense=self.keep_dense, curves=self.curves, fixed=fixed, influence=influence)
        whole = allocation_from_ranks(name, self.units, result.ranks, locked=result.locked, allocator=name)
        return round_ranks_down(whole, self.units, self.rank_multiple)

    def _ratios(self, count: int) -> list[float]:
        if self.max_ratio is None:
            return [self.compression_ratio]
        return [self.compression_ratio + (self.max_ratio - self.compression_ratio) * index / (count - 1) for index in range(count)]

    def _alone(self, unit: Unit) -> bool:
        """Return whether no smaller unit holds a part of it: rules that know no errors can't choose between alternatives."""
        names = {member.name for member in unit.members}
        return not any(other is not unit and {member.name for member in other.members} < names for other in self.units)

    def point_of(self, allocator: str, compression_ratio: float) -> dict[str, float]:
        """Return the point that ``allocator`` is: ones or no depth bias for ``lagrangian``, else kept fractions by type."""
        rule = ALLOCATORS[allocator]
        if rule.trades_errors and self.by_depth:
            return {ALPHA: 0.0, GAMMA: 0.0}
        if rule.trades_errors:
            return {group: 1.0 for group in self.groups if group != self._reference}
        assert isinstance(rule, ByMultipliers)
        targets = rule.multipliers(self.units)
        first = {self.group_of(unit): targets[unit.name] for unit in reversed(self._free)}
        return {group: first[group] for group in self.groups}

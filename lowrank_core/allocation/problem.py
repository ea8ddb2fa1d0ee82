"""Input of an allocator: units, prices, budget, locked ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lowrank_core.allocation.base import ErrorCurves, Perplexities, Ranks, units_by_name
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.parameters import Unit, budget_for_ratio, compression_ratio, dense_parameters

__all__ = ["AllocationProblem", "Allocator", "unreachable"]

_LOCKS_SHOWN = 3


@dataclass(frozen=True)
class AllocationProblem:
    """A budget and the units that share it.

    Attributes:
        units: every unit, alternatives and what stays dense included: the ratio counts each of their matrices once.
        compression_ratio: fraction of the parameters to remove, in [0, 1).
        keep_dense: names of matrices that stay as they are, unless a unit of ``fixed`` holds them.
        curves: errors by unit, where they are known.
        fixed: ranks that the user chose (None: dense), by unit. Units that share a matrix with one of these are not offered; a rank
            that would cost as much as the matrices is stored dense.
        weights: w_u > 0 on the errors of a unit, 1 where there is none; for allocators that trade errors.
        influence: of each block, by depth (``LayerStatistics.influence``); empty where it was not measured.
        perplexities: of the model with one unit cut alone (``measured_perplexities``); empty where they were not measured.
        rank_multiple: ranks are rounded down to a multiple of it afterwards, unless the allocator takes such alone.

    Raises:
        ConfigError: ``fixed`` or ``weights`` name no unit, a weight is not positive, or two fixed units hold the same matrix.
        RankError: a fixed rank outside its limits.
    """

    units: tuple[Unit, ...]
    compression_ratio: float
    keep_dense: frozenset[str] = frozenset()
    curves: ErrorCurves | None = None
    fixed: Ranks = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    influence: Sequence[float] = ()
    perplexities: Perplexities = field(default_factory=dict)
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        known = units_by_name(self.units, self.fixed, "locked ranks")
        for name, rank in self.fixed.items():
            known[name].parameters(rank)  # checks the rank
        counts = Counter(member.name for name in self.fixed for member in known[name].members)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ConfigError(f"locked ranks: {twice[0]} is locked twice, alone and in a stack. Unlock one of the two.")
        units_by_name(self.units, self.weights, "weights")
        for name, weight in self.weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"weights: {name} must have a positive, finite weight, got {weight:g}. Leave it out for a weight of 1.")

    @cached_property
    def _fixed_units(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.name in self.fixed)

    @cached_property
    def free(self) -> tuple[Unit, ...]:
        """Units that may be compressed, at a gain, and whose ranks nobody chose yet."""
        taken = self.keep_dense.union(member.name for unit in self._fixed_units for member in unit.members)
        return tuple(u for u in self.units if u.break_even_rank > 0 and not any(m.name in taken for m in u.members))

    @property
    def committed(self) -> int:
        """Parameters of the matrices that no free unit covers: dense, or at their fixed ranks."""
        saved = sum(max(0, unit.dense_parameters - unit.parameters(self.fixed[unit.name])) for unit in self._fixed_units)
        return dense_parameters(self.units) - dense_parameters(self.free) - saved

    @property
    def available(self) -> int:
        """Parameters for the matrices of the free units: the budget without what the others cost."""
        return budget_for_ratio(self.units, self.compression_ratio) - self.committed

    @property
    def kept_share(self) -> float:
        """The fraction of the free units' parameters that the budget leaves, at most 1."""
        return min(1.0, self.available / max(1, dense_parameters(self.free)))

    def without_alternatives(self) -> tuple[Unit, ...]:
        """Return the free units of a problem in which each matrix is in one of them.

        Raises:
            ConfigError: units are alternatives of each other; only their errors could tell which to take.
        """
        counts = Counter(member.name for unit in self.free for member in unit.members)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ConfigError(
                f"{twice[0]} stands alone and in a stack; this allocation can't choose. Allocate by `lagrangian`, or offer no alternatives."
            )
        return self.free

    def known_curves(self, allocator: str) -> ErrorCurves:
        """Return the errors of the units.

        Raises:
            ConfigError: they are not known.
        """
        if self.curves is None:
            raise ConfigError(f"the allocation {allocator} works from the errors of the units; factorise first.")
        return self.curves

    def completed(self, ranks: Ranks) -> dict[str, int | None]:
        """Return ``ranks`` of free units together with the fixed ones, and None for units that hold none of their matrices."""
        result = {**ranks, **self.fixed}
        covered = {member.name for unit in self.units if unit.name in result for member in unit.members}
        for unit in sorted(self.units, key=lambda unit: len(unit.members)):
            names = {member.name for member in unit.members}
            if not names & covered:
                result[unit.name] = None
                covered |= names
        return result


class Allocator(ABC):
    """A rule that spends a budget: never over it, and under it by less than the cheapest step that is left. It needs nothing by default.

    Attributes:
        needs_curves, needs_influence: whether it needs error curves, or the influence of blocks.
        needs_perplexities: whether it needs the perplexity with each unit cut alone, which takes minutes.
        needs_weights: whether it needs weights that are measured on the model, which takes minutes, too.
        trades_errors: whether it gives up error in one matrix for error in another: they must then be in one unit, or weighted.
        takes_alternatives: whether it chooses between units that share matrices; the others get single matrices.
        neutral: whether it prefers no type of matrix: as a point of a search it is the middle, at every ratio.
    """

    name: str
    label: str
    reference: str
    needs_curves = False
    needs_influence = False
    needs_perplexities = False
    needs_weights = False
    trades_errors = False
    takes_alternatives = False
    neutral = False

    @property
    def measures(self) -> bool:
        """Whether the model has to be measured for it, beyond what every run keeps."""
        return self.needs_perplexities or self.needs_weights

    @abstractmethod
    def ranks(self, problem: AllocationProblem) -> Ranks:
        """Return the rank of each free unit that is used, None where it stays dense; ``problem.completed`` adds the rest.

        Raises:
            BudgetError: the ratio can't be met.
            ConfigError: it needs errors, influences or perplexities and there are none, or it can't choose between alternatives.
        """


def unreachable(problem: AllocationProblem, minimum: int) -> BudgetError:
    """Return the error for a budget below ``least``, the cost of the free units at rank 1."""
    dense = dense_parameters(problem.units)
    maximum = compression_ratio(dense, problem.committed + minimum)
    start = f"compression ratio {problem.compression_ratio:g} can't be met: the matrices that stay dense"
    if not problem.fixed:
        return BudgetError(
            f"{start}, with rank 1 everywhere else, remove only {maximum:.3f}. Lower the ratio, or compress the value projections too."
        )
    locks = f"the {len(problem.fixed)} locked ranks" if len(problem.fixed) > 1 else "the locked rank"
    loosen = _heaviest_locks(problem)
    return BudgetError(
        f"{start} and {locks}, with rank 1 everywhere else, remove only {maximum:.3f}. "
        f"Lower the ratio to at most {math.floor(maximum * 1000) / 1000:g}{f', or loosen a lock: {loosen}' if loosen else ''}."
    )


def _heaviest_locks(problem: AllocationProblem) -> str:
    """Return the locks with the most parameters above rank 1, in words."""
    costs = {u: min(u.dense_parameters, u.parameters(problem.fixed[u.name])) for u in problem.units if u.name in problem.fixed}
    spare = {u: cost - u.parameters(1) for u, cost in costs.items() if cost > u.parameters(1)}
    heaviest = sorted(spare, key=spare.__getitem__, reverse=True)[:_LOCKS_SHOWN]
    words = {u: "dense" if costs[u] == u.dense_parameters else f"rank {problem.fixed[u.name]}" for u in heaviest}
    return ", ".join(f"{u.name} ({words[u]}, {costs[u]:,} parameters)" for u in heaviest)

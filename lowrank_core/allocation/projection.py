"""Projecting wishes onto a budget: kept fractions in proportion to multipliers, spent to the last step.

Notation::

    k_i   kept fraction of unit i, in (0, 1]; 1 means dense
    x_i   multiplier of unit i: only ratios between multipliers matter
    s     common scale with  Σ cost_i(min(1, s·x_i)) = budget,  found by bisection
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from lowrank_core.allocation.base import Ranks
from lowrank_core.allocation.problem import AllocationProblem, Allocator, unreachable
from lowrank_core.parameters import Unit

__all__ = ["ByMultipliers", "kept_fractions", "project"]

_BISECTION_STEPS = 100  # halves the bracket to below one part in 2^100: exact in float64


class ByMultipliers(Allocator):
    """An allocator that needs no errors: it says how much each unit keeps, in proportion."""

    @abstractmethod
    def multipliers(self, units: Sequence[Unit]) -> dict[str, float]:
        """Return a positive multiplier for the kept fraction of each unit, by name."""

    def ranks(self, problem: AllocationProblem) -> Ranks:
        return project(problem, self.multipliers(problem.units))


def project(problem: AllocationProblem, multipliers: Mapping[str, float]) -> dict[str, int | None]:
    """Spend the budget in proportion to ``multipliers`` (positive, by name of a free unit); what is fixed stays as it is.

    The result never costs more than the budget, and less by under the cheapest step that is left.

    Raises:
        BudgetError: even rank 1 everywhere costs more than the budget.
        ConfigError: units are alternatives of each other; only their errors could tell which to take.
    """
    free, available = problem.without_alternatives(), problem.available
    minimum = sum(unit.parameters(1) for unit in free)
    if available < minimum:
        raise unreachable(problem, minimum)
    targets = _scaled_targets(free, multipliers, available)
    ranks = {unit.name: unit.rank_for_parameters(targets[unit.name]) for unit in free}
    _shrink_to_fit(free, ranks, targets, available)
    _spend_remainder(free, ranks, targets, available)
    return problem.completed(ranks)


def kept_fractions(problem: AllocationProblem, multipliers: Mapping[str, float]) -> dict[str, float]:
    """Return the kept fraction of each unit if ranks were continuous: as chosen where it is fixed, 1 for what stays dense."""
    targets = _scaled_targets(problem.free, multipliers, problem.available)
    for unit in problem.units:
        targets.setdefault(unit.name, min(unit.dense_parameters, unit.parameters(problem.fixed.get(unit.name))))
    return {unit.name: targets[unit.name] / unit.dense_parameters for unit in problem.units}


def _scaled_targets(free: Sequence[Unit], multipliers: Mapping[str, float], available: int) -> dict[str, float]:
    """Return the parameters that each unit would get, if ranks were continuous."""

    def targets(scale: float) -> dict[str, float]:
        return {u.name: min(1.0, scale * multipliers[u.name]) * u.dense_parameters for u in free}

    if not free:
        return {}
    low, high = 0.0, 1.0 / min(multipliers[u.name] for u in free)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(targets(middle).values()) <= available else (low, middle)
    return targets(high)


def _step(unit: Unit, rank: int) -> int:
    """Return what the step below ``rank`` saves."""
    return unit.parameters(rank) - (unit.parameters(rank - 1) if rank > 1 else unit.bias_parameters)


def _shrink_to_fit(free: Sequence[Unit], ranks: dict[str, int | None], targets: Mapping[str, float], available: int) -> None:
    """Lower ranks where the minimum of rank 1 pushed the total over the budget; the smallest loss first."""
    spent = sum(u.parameters(ranks[u.name]) for u in free)

    def excess(unit: Unit) -> float:
        return (unit.parameters(ranks[unit.name]) - targets[unit.name]) / _step(unit, ranks[unit.name] or unit.break_even_rank)

    while spent > available:
        unit = max((u for u in free if ranks[u.name] != 1), key=excess)
        rank = ranks[unit.name]
        before = unit.parameters(rank)
        ranks[unit.name] = unit.break_even_rank if rank is None else rank - 1
        spent -= before - unit.parameters(ranks[unit.name])


def _spend_remainder(free: Sequence[Unit], ranks: dict[str, int | None], targets: Mapping[str, float], available: int) -> None:
    """Add single ranks, the furthest below its wish first, until no step fits."""
    left = available - sum(u.parameters(ranks[u.name]) for u in free)
    by_name = {u.name: u for u in free}

    def entry(unit: Unit, rank: int) -> tuple[float, str]:
        return (unit.parameters(rank) - targets[unit.name]) / _step(unit, rank), unit.name

    heap = [entry(u, rank) for u in free if (rank := ranks[u.name]) is not None]
    heapq.heapify(heap)
    while heap:
        unit = by_name[heapq.heappop(heap)[1]]
        rank = ranks[unit.name]
        assert rank is not None
        following = rank + 1 if rank < unit.break_even_rank else None
        step = unit.parameters(following) - unit.parameters(rank)
        if step > left:
            continue  # other units' steps may fit; what is left only shrinks, so this one is done
        left -= step
        ranks[unit.name] = following
        if following is not None:
            heapq.heappush(heap, entry(unit, following))

"""One threshold for all units: their steps in one common order, taken until the budget is spent.

Notation::

    step   of a unit: rank 1 -> 2, 2 -> 3, …, break-even -> dense
    key    of a step: what the rule compares; it never falls along the steps of a unit

Every unit begins at rank 1. A threshold on the keys takes all steps below it, so the threshold that spends the budget is found by
sorting the steps once: exactly, with neither a bracket nor a tolerance, and unchanged by any increasing function of the keys. The first
step that does not fit ends its unit; what is left goes to the steps of the others, still in order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowrank_core.allocation.problem import AllocationProblem, unreachable
from lowrank_core.parameters import Unit
from lowrank_core.types import Vector

__all__ = ["Keys", "spend_in_order"]

Keys = Callable[[Unit], Vector]
"""Unit -> key (break_even_rank,) of each of its steps; the last is the step to dense."""


@dataclass(frozen=True)
class _Steps:
    """The steps of all units, one unit after the other.

    Attributes:
        units, first: the unit of each step, and where each unit's steps begin.
        costs, keys: of each step.
        places: of each step among those of its unit, in [0, 1): equal keys are shared out evenly.
    """

    units: npt.NDArray[np.intp]
    first: npt.NDArray[np.intp]
    costs: npt.NDArray[np.int64]
    keys: Vector
    places: Vector

    @classmethod
    def of(cls, units: Sequence[Unit], keys: Keys) -> _Steps:
        counts = np.array([unit.break_even_rank for unit in units])
        return cls(
            np.repeat(np.arange(len(units)), counts),
            np.concatenate([[0], counts.cumsum()]),
            np.concatenate([np.diff(np.append(unit.prices, unit.dense_parameters)) for unit in units]),
            np.concatenate([np.maximum.accumulate(keys(unit)) for unit in units]),
            np.concatenate([np.arange(count) / count for count in counts]),
        )

    def taken(self, left: int) -> list[int]:
        """Return how many steps each unit takes of those that ``left`` parameters pay for."""
        order = np.lexsort((self.places, self.keys))
        spent = self.costs[order].cumsum()
        cut = int(np.searchsorted(spent, left, side="right"))
        taken = np.bincount(self.units[order[:cut]], minlength=len(self.first) - 1).tolist()
        return self._filled(taken, left - (int(spent[cut - 1]) if cut else 0))

    def _filled(self, taken: list[int], left: int) -> list[int]:
        heap = [entry for unit in range(len(taken)) if (entry := self._next(unit, taken[unit])) is not None]
        heapq.heapify(heap)
        while heap:
            _, _, unit, cost = heapq.heappop(heap)
            if cost > left:
                continue  # what is left only shrinks, so this unit is done
            left -= cost
            taken[unit] += 1
            entry = self._next(unit, taken[unit])
            if entry is not None:
                heapq.heappush(heap, entry)
        return taken

    def _next(self, unit: int, taken: int) -> tuple[float, float, int, int] | None:
        step = int(self.first[unit]) + taken
        if step == self.first[unit + 1]:
            return None
        return float(self.keys[step]), float(self.places[step]), unit, int(self.costs[step])


def spend_in_order(problem: AllocationProblem, keys: Keys) -> dict[str, int | None]:
    """Return the ranks of the free units, their steps taken in the order of ``keys``, the smallest first.

    Raises:
        BudgetError: even rank 1 everywhere costs more than the budget.
        ConfigError: units are alternatives of each other.
    """
    free = problem.without_alternatives()
    minimum = sum(unit.parameters(1) for unit in free)
    if problem.available < minimum:
        raise unreachable(problem, minimum)
    if not free:
        return {}
    taken = _Steps.of(free, keys).taken(problem.available - minimum)
    return {unit.name: None if steps == unit.break_even_rank else 1 + steps for unit, steps in zip(free, taken, strict=True)}

"""The same retained energy everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.allocation.base import Ranks
from lowrank_core.allocation.ordered import spend_in_order
from lowrank_core.allocation.problem import AllocationProblem, Allocator
from lowrank_core.parameters import Unit
from lowrank_core.types import Vector

__all__ = ["Energy"]


@dataclass(frozen=True)
class Energy(Allocator):
    """Give every unit the smallest rank that retains 1 - e_r/e_0 of its energy, for one threshold that spends the budget.

    A unit that would need more than its break-even rank stays dense. Each error is compared with its own unit's e_0 alone, so the unit
    of an error doesn't matter.
    """

    name: str = "energy"
    label: str = "Equal energy"
    reference: str = "the usual rule for a principal component analysis"
    needs_curves = True

    def ranks(self, problem: AllocationProblem) -> Ranks:
        curves = problem.known_curves(self.name)

        def keys(unit: Unit) -> Vector:
            errors = curves[unit.name]
            lost: Vector = errors[1 : unit.break_even_rank + 1] / (errors[0] or 1.0)
            return -lost

        return spend_in_order(problem, keys)

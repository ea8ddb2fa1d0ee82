"""One threshold of relative singular values for all units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_core.allocation.base import Ranks
from lowrank_core.allocation.ordered import spend_in_order
from lowrank_core.allocation.problem import AllocationProblem, Allocator
from lowrank_core.parameters import Unit
from lowrank_core.types import Vector

__all__ = ["Threshold"]


@dataclass(frozen=True)
class Threshold(Allocator):
    """Every unit keeps the singular values with σ_j/σ_1 above one threshold, which spends the budget.

    The singular values are those of the basis, in its metric: σ_j² = e_(j-1) - e_j. A unit that would need more than its break-even rank
    stays dense; the first singular value is always kept. WeLore, arXiv 2407.11239, whose basis is the weights' own.
    """

    name: str = "threshold"
    label: str = "Singular value threshold (WeLore)"
    reference: str = "arXiv 2407.11239"
    needs_curves = True

    def ranks(self, problem: AllocationProblem) -> Ranks:
        curves = problem.known_curves(self.name)

        def keys(unit: Unit) -> Vector:
            energies = np.maximum(-np.diff(curves[unit.name], append=curves[unit.name][-1]), 0.0)  # after the last, there is none
            values: Vector = np.sqrt(energies[1 : unit.break_even_rank + 1] / (energies[0] or 1.0))
            return -values

        return spend_in_order(problem, keys)

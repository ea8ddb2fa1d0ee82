"""Less compression where truncation loses more, among matrices of one type: SVD-LLM V2.

Notation::

    R     fraction of the free units' parameters to remove
    L_u   √(T e_u) at the rank that a uniform allocation gives u: the theoretical truncation loss (Frobenius, in the basis' metric,
          over the T tokens of the paper's calibration; e is a mean over tokens)
    G     the units of one type
    R_u   |G| · R · a_u / Σ_G a,  a_u = 1 / log L_u in the paper: its mean over G is R
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.allocation.base import ErrorCurves, Ranks
from lowrank_core.allocation.problem import AllocationProblem, Allocator
from lowrank_core.allocation.projection import project
from lowrank_core.parameters import Unit

__all__ = ["SvdLlmV2"]

_MIN_KEPT = 0.01
"""Of the parameters, where the formula asks for less, or for nothing at all."""

_TOKENS = 256 * 2048
"""Of the paper's calibration: the logarithm of a loss that is a sum depends on how many were summed."""


@dataclass(frozen=True)
class SvdLlmV2(Allocator):
    """Within a type, the fraction removed from a matrix is in proportion to 1 / log of its truncation loss. arXiv 2503.12340, §3.2.

    The paper's log L_u depends on the unit of L, and has no use at L <= 1: a loss below e counts as e. What is kept is clipped to (0, 1]
    and scaled onto the budget.
    """

    name: str = "svd_llm_v2"
    label: str = "Truncation loss by type (SVD-LLM V2)"
    reference: str = "arXiv 2503.12340"
    needs_curves = True

    def ranks(self, problem: AllocationProblem) -> Ranks:
        curves, kept = problem.known_curves(self.name), problem.kept_share
        groups: dict[str, list[Unit]] = {}
        for unit in problem.without_alternatives():
            groups.setdefault(unit.kind, []).append(unit)
        targets: dict[str, float] = {}
        for group in groups.values():
            shares = _shares([_loss(unit, curves, kept) for unit in group])
            targets |= {u.name: max(_MIN_KEPT, 1 - (1 - kept) * share) for u, share in zip(group, shares, strict=True)}
        return project(problem, targets)


def _loss(unit: Unit, curves: ErrorCurves, kept: float) -> float:
    rank = unit.rank_for_parameters(kept * unit.dense_parameters)
    return 0.0 if rank is None else math.sqrt(_TOKENS * max(0.0, float(curves[unit.name][rank])))


def _shares(losses: Sequence[float]) -> list[float]:
    """Return a_u of each loss over their mean."""
    inverse = [1 / math.log(max(math.e, loss)) for loss in losses]
    mean = sum(inverse) / len(inverse)
    return [value / mean for value in inverse]

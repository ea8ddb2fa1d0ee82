"""Ranks of LEMS: measured scales, a depth bias, and an exact integer program over the error curves.

Notation::

    e_u(r)      error of unit u at rank r in the metric of the factors: the sum of σ_k² behind rank r
    κ_u         KL divergence of the model with u alone cut to r_0, a tenth of its break-even rank
    h_b(α)      Σ_{k>=b} (k + 1)^-α over the blocks k, scaled to [0, 1]: 1 for the first block, 0 for the last
    w_u         (κ_u / e_u(r_0)) · (1 + γ h_b(α)):  w_u e_u(r) is κ_u [1 - E_u(r)/E_u] / [1 - E_u(r_0)/E_u] · (1 + γ h_b(α)), where
                E_u(r) is the sum of σ_k² up to r and E_u that of all
    c_u(j)      cost of u's j-th choice: ranks that are multiples of ``rank_multiple``, those below one, and dense
    λ, L        a price, and Σ_u min_j (w_u e_u(j) + λ c_u(j)) - λ · budget: no allocation within the budget leaves less, whatever λ
    d_u(j)      w_u e_u(j) + λ c_u(j) - min_j (…) >= 0: what the choice adds to L

The program, min Σ w_u e_u(j) within the budget, is solved exactly. An allocation is known at first, of error U (equal slopes). A better
one has Σ d_u(j) < U - L: choices with d_u(j) above U - L are out, and a dynamic program goes over what is left, unit by unit, and keeps of
the partial allocations those that no other beats in both cost and error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowrank_core.allocation.base import Ranks, round_down
from lowrank_core.allocation.problem import AllocationProblem, Allocator, unreachable
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import Unit
from lowrank_core.types import Vector

__all__ = ["MAX_ALPHA", "MAX_GAMMA", "TRIALS", "DepthBias", "Lems", "exact_choices"]

MAX_ALPHA, MAX_GAMMA = 3.0, 7.0
TRIALS = 10
"""Of the depth bias: the bounds of the paper's search, and its trials."""

_STEPS = 80  # of the logarithm of λ
_SLACK = 1e-12  # relative: rounding never takes the best allocation away

Costs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DepthBias:
    """1 + γ h_b(α): errors of early blocks weigh more, since they propagate."""

    alpha: float
    gamma: float

    def factor(self, block: int, blocks: int) -> float:
        """Return the weight of an error in ``block`` of ``blocks``."""
        terms = np.arange(1, blocks + 1, dtype=np.float64) ** -self.alpha
        tails = terms[::-1].cumsum()[::-1]
        spread = float(tails[0] - tails[-1])
        return 1.0 + self.gamma * (float(tails[block] - tails[-1]) / spread if spread > 0 else 0.0)

    def weights(self, units: Sequence[Unit], scales: Mapping[str, float]) -> dict[str, float]:
        """Return the scales of ``units``, those of early blocks raised."""
        blocks = 1 + max(member.depth for unit in units for member in unit.members)
        return {unit.name: scales[unit.name] * self.factor(unit.depth, blocks) for unit in units if unit.name in scales}


@dataclass(frozen=True)
class Lems(Allocator):
    """Minimise Σ w_i e_i(r_i) exactly. Its weights are measured first (``compression.lems``). LEMS, ICML 2026."""

    name: str = "lems"
    label: str = "Measured scales, depth bias, integer program (LEMS)"
    reference: str = "LEMS, ICML 2026"
    needs_curves = True
    needs_weights = True

    def ranks(self, problem: AllocationProblem) -> Ranks:
        free, curves = problem.without_alternatives(), problem.known_curves(self.name)
        missing = [unit.name for unit in free if unit.name not in problem.weights]
        if missing:
            raise ConfigError(
                f"the allocation lems works from measured weights, and that of {missing[0]} was not measured. "
                "Use `lowrank compress --allocation lems`, which measures them, or compare with the preset lems."
            )
        minimum = sum(unit.parameters(1) for unit in free)
        if problem.available < minimum:
            raise unreachable(problem, minimum)
        if not free:
            return {}
        ranks = [_ranks(unit, problem.rank_multiple) for unit in free]
        costs = [np.array([unit.parameters(rank) for rank in given], dtype=np.int64) for unit, given in zip(free, ranks, strict=True)]
        errors = [
            problem.weights[unit.name] * np.array([0.0 if rank is None else curves[unit.name][rank] for rank in given])
            for unit, given in zip(free, ranks, strict=True)
        ]
        chosen = exact_choices(costs, errors, problem.available)
        return {unit.name: given[choice] for unit, given, choice in zip(free, ranks, chosen, strict=True)}


def _ranks(unit: Unit, multiple: int) -> list[int | None]:
    """Return the choices of a unit; below a multiple no rank is rounded (``round_down``), so that every budget can be met."""
    return [*(rank for rank in range(1, unit.break_even_rank + 1) if round_down(rank, multiple) == rank), None]


def exact_choices(costs: Sequence[Costs], errors: Sequence[Vector], budget: int) -> list[int]:
    """Return the choice of each unit with the smallest sum of errors among those that cost at most ``budget`` together.

    Args:
        costs, errors: of the choices of each unit; the cheapest ones together are within the budget.
    """
    price, start = _priced(costs, errors, budget)
    sums = [error + price * cost for cost, error in zip(costs, errors, strict=True)]
    added = [total - total.min() for total in sums]
    bound = sum(float(total.min()) for total in sums) - price * budget
    known = sum(float(error[choice]) for error, choice in zip(errors, start, strict=True))
    gap = max(0.0, known - bound) + _SLACK * (known + price * budget)
    kept = [np.flatnonzero(own <= gap) for own in added]
    best = _combined([(c[k], e[k], a[k]) for c, e, a, k in zip(costs, errors, added, kept, strict=True)], budget, gap)
    result = start if best is None else [int(rows[choice]) for rows, choice in zip(kept, best, strict=True)]
    if sum(float(error[choice]) for error, choice in zip(errors, result, strict=True)) > known:
        return start
    return _filled(result, costs, errors, budget - sum(int(cost[choice]) for cost, choice in zip(costs, result, strict=True)))


def _priced(costs: Sequence[Costs], errors: Sequence[Vector], budget: int) -> tuple[float, list[int]]:
    """Return the price at which equal slopes just meet the budget, and what they choose, filled with what still fits."""

    def at(price: float) -> list[int]:
        return [int((error + price * cost).argmin()) for cost, error in zip(costs, errors, strict=True)]

    def spent(choices: Sequence[int]) -> int:
        return sum(int(cost[choice]) for cost, choice in zip(costs, choices, strict=True))

    largest = max(max(float(error.max()) for error in errors), np.finfo(np.float64).tiny)
    low, high, best = np.log(largest) - 100.0, np.log(largest) + 10.0, [int(cost.argmin()) for cost in costs]
    for _ in range(_STEPS):
        middle = (low + high) / 2
        chosen = at(float(np.exp(middle)))
        low, high, best = (low, middle, chosen) if spent(chosen) <= budget else (middle, high, best)
    return float(np.exp(high)), _filled(best, costs, errors, budget - spent(best))


def _filled(chosen: list[int], costs: Sequence[Costs], errors: Sequence[Vector], left: int) -> list[int]:
    """Take the change that lowers the error most for its cost, or at least does not raise it, until none fits in what is ``left``."""
    result = list(chosen)
    while True:
        steps = []
        for unit, choice in enumerate(result):
            extra, gain = costs[unit] - costs[unit][choice], errors[unit][choice] - errors[unit]
            fitting = np.flatnonzero((extra > 0) & (extra <= left) & (gain >= 0))
            steps += [(float(gain[j] / extra[j]), unit, int(j)) for j in fitting]
        if not steps:
            return result
        _, unit, choice = max(steps)
        left -= int(costs[unit][choice] - costs[unit][result[unit]])
        result[unit] = choice


def _combined(tables: Sequence[tuple[Costs, Vector, Vector]], budget: int, gap: float) -> list[int] | None:
    """Return the choices with the smallest sum of errors within ``budget`` and with Σ d within ``gap``; None where there are none.

    ``tables`` are the costs, errors and d of the choices of each unit.
    Partial allocations are extended unit by unit. One is dropped if another costs no more and errs no more, if its Σ d is above the gap,
    or if the cheapest choices of the units to come don't fit behind it.
    """
    cheapest = np.array([int(cost.min()) for cost, _, _ in tables], dtype=np.int64)
    after = np.append(cheapest[::-1].cumsum()[::-1][1:], 0)
    spent: Costs = np.zeros(1, dtype=np.int64)
    error: Vector = np.zeros(1)
    sums: Vector = np.zeros(1)
    trail: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for unit, (own, losses, adds) in enumerate(tables):
        spents, losses, adds = (spent[:, None] + own).ravel(), (error[:, None] + losses).ravel(), (sums[:, None] + adds).ravel()
        order = np.flatnonzero((adds <= gap) & (spents + after[unit] <= budget))
        order = order[np.lexsort((losses[order], spents[order]))]
        order = order[losses[order] < np.minimum.accumulate(np.append(np.inf, losses[order]))[:-1]]
        if not len(order):
            return None
        trail.append((order // len(own), order % len(own)))
        spent, error, sums = spents[order], losses[order], adds[order]
    state, choices = int(error.argmin()), []
    for parents, picks in reversed(trail):
        choices.append(int(picks[state]))
        state = int(parents[state])
    return choices[::-1]

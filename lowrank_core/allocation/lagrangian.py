"""Optimal allocation by exact error curves: one threshold for all units.

Notation::

    c_u(j), e_u(j)   cost and error of unit u at its j-th choice: rank 1, 2, …, break-even, and dense
    w_u              weight of its errors: what one of them costs the loss
    λ                price of a parameter in units of the weighted error
    L_u(λ)           min_j w_u e_u(j) + λ c_u(j)
    site             matrices that some units cover together in more than one way; a cover takes each matrix once

For a price λ each unit takes the choice that attains L_u(λ), and each site the cover with the smallest Σ L_u(λ). What is spent falls
as λ grows, so the budget fixes λ by bisection: points on the lower hull of every curve, dense ones included. What is left over goes
to the choices with the best Δerror/Δcost that still fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowrank_core.allocation.base import Ranks
from lowrank_core.allocation.problem import AllocationProblem, Allocator, unreachable
from lowrank_core.parameters import Unit

__all__ = ["Lagrangian", "Market"]

Table = npt.NDArray[np.float64]

_BISECTION_STEPS = 80  # of the logarithm of λ, over 60 decades: to the last bit that matters


@dataclass(frozen=True)
class Lagrangian(Allocator):
    """Minimise Σ w_i e_i(r_i) subject to Σ cost_i(r_i) <= budget (docs/methods.md §5); equal slopes, as in reverse water-filling."""

    name: str = "lagrangian"
    label: str = "Lagrangian (equal slopes)"
    reference: str = "Lagrangian allocation; Everett 1963, Shoham & Gersho 1988"
    needs_curves = True
    trades_errors = True
    takes_alternatives = True
    neutral = True

    def ranks(self, problem: AllocationProblem) -> Ranks:
        free = problem.free
        if not free:
            if problem.available < 0:
                raise unreachable(problem, 0)
            return {}
        curves = problem.known_curves(self.name)
        market = Market.of([_rows(unit, curves[unit.name], problem.weights.get(unit.name, 1.0)) for unit in free], free)
        if market.minimum > problem.available:
            raise unreachable(problem, market.minimum)
        chosen = market.choices(problem.available)
        return {free[row].name: None if choice == free[row].break_even_rank else choice + 1 for row, choice in chosen.items()}


def _rows(unit: Unit, curve: Table, weight: float) -> tuple[Table, Table]:
    """Return costs and weighted errors (break-even + 1,) of the ranks of a unit, then of the dense matrices."""
    last = unit.break_even_rank
    return np.append(unit.prices, unit.dense_parameters), np.append(weight * curve[1 : last + 1], 0.0)


@dataclass(frozen=True)
class Market:
    """Costs and weighted errors of every choice (units, choices), padded with infinity, and the covers of every site.

    The first choice of each unit is its cheapest.
    """

    costs: Table
    errors: Table
    sites: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]], units: Sequence[Unit]) -> Market:
        """Return the market of (costs, errors) of the choices of each unit."""
        return cls(_padded([costs for costs, _ in rows]), _padded([errors for _, errors in rows]), tuple(_sites(units)))

    @property
    def _cheapest(self) -> dict[int, int]:
        return {unit: 0 for cover in (min(site, key=self._least) for site in self.sites) for unit in cover}

    @property
    def minimum(self) -> int:
        """Cost of the cheapest choices."""
        return int(self._spent(self._cheapest))

    def choices(self, available: int) -> dict[int, int]:
        """Return the choice of each unit that is used; ``available`` is at least the minimum."""
        low, high = self._bracket()  # logarithms of prices: too much is spent at low, and at most the budget at high
        best = self._cheapest
        for _ in range(_BISECTION_STEPS):
            middle = (low + high) / 2
            chosen = self._at(float(np.exp(middle)))
            if self._spent(chosen) <= available:
                best, high = chosen, middle
            else:
                low = middle
        return self._filled(best, available - int(self._spent(best)))

    def _bracket(self) -> tuple[float, float]:
        finite = self.errors[np.isfinite(self.errors)]
        largest = max(float(finite.max()), np.finfo(np.float64).tiny)
        return float(np.log(largest)) - 100.0, float(np.log(largest)) + 10.0

    def _least(self, cover: tuple[int, ...]) -> float:
        return float(sum(self.costs[unit, 0] for unit in cover))

    def _spent(self, chosen: dict[int, int]) -> float:
        return float(sum(self.costs[unit, choice] for unit, choice in chosen.items()))

    def _at(self, price: float) -> dict[int, int]:
        totals = self.errors + price * self.costs
        picks = totals.argmin(axis=1)
        values = totals[np.arange(len(picks)), picks]
        covers = (min(site, key=lambda cover: values[list(cover)].sum()) for site in self.sites)
        return {unit: int(picks[unit]) for cover in covers for unit in cover}

    def _filled(self, chosen: dict[int, int], left: int) -> dict[int, int]:
        """Take the choice with the best Δerror/Δcost that fits in what is ``left``, until none does."""
        filled = dict(chosen)
        rows = np.array(sorted(filled))
        while True:
            now = np.array([filled[row] for row in rows])
            extra = self.costs[rows] - self.costs[rows, now][:, None]
            gain = self.errors[rows, now][:, None] - self.errors[rows]
            fits = (extra > 0) & (extra <= left)
            if not fits.any():
                return filled
            rate = np.where(fits, gain / np.where(fits, extra, 1.0), -np.inf)
            row, choice = np.unravel_index(int(rate.argmax()), rate.shape)
            left -= int(extra[row, choice])
            filled[int(rows[row])] = int(choice)


def _padded(rows: Sequence[npt.ArrayLike]) -> Table:
    values = [np.asarray(row, dtype=np.float64) for row in rows]
    result = np.full((len(values), max(map(len, values))), np.inf)
    for index, row in enumerate(values):
        result[index, : len(row)] = row
    return result


def _sites(units: Sequence[Unit]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield the covers of each set of matrices that units share: with no alternatives, one cover of one unit each."""
    members = [frozenset(member.name for member in unit.members) for unit in units]
    waiting = set(range(len(units)))
    while waiting:
        together = {min(waiting)}
        names: frozenset[str] = frozenset()
        while True:
            names = names.union(*(members[unit] for unit in together))
            wider = {unit for unit in waiting if members[unit] & names}
            if wider == together:
                break
            together = wider
        waiting -= together
        yield tuple(_covers(names, sorted(together), members))


def _covers(names: frozenset[str], units: Sequence[int], members: Sequence[frozenset[str]]) -> Iterator[tuple[int, ...]]:
    """Yield every way to take each of ``names`` exactly once."""
    if not names:
        yield ()
        return
    first = min(names)
    for unit in units:
        if first in members[unit] and members[unit] <= names:
            for rest in _covers(names - members[unit], units, members):
                yield (unit, *rest)

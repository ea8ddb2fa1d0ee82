"""The search space: one multiplier for each group of matrices.

A point is a vector x of kept fractions in [LEAST, 1]. Projected, only their ratios matter: they are scaled so that the budget is
spent exactly, and every trial is feasible. As published, they are the kept fractions themselves, and a point is feasible if what it
keeps lies between the budget and a tenth of the parameters less. Bounds as in the paper's published code; groups ``5x1``: q and k
together, o, gate, up, down, shared by depth (other architectures: one variable for each module type).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, FloatDistribution

from lowrank_core.accounting import Unit
from lowrank_core.allocation import (
    ALLOCATORS,
    AllocationProblem,
    ByMultipliers,
    RankAllocation,
    allocation_from_ranks,
    floored,
    kept_fractions,
    module_group,
    project,
    rounded_down,
)
from lowrank_core.errors import ConfigError

__all__ = ["BASELINES", "SearchSpace"]

LEAST = 0.2
PUBLISHED_MARGIN = 0.1
"""Fraction of the parameters that a published trial may remove beyond the ratio."""

BASELINES = ("uniform", "lord_manual")
"""Allocators that are enqueued as the first trials, so that the result is never worse than any of them."""


@dataclass(frozen=True)
class SearchSpace:
    """Variables of a search and what a point of them means.

    Attributes:
        units: every compressible matrix, alone or in a stack, with the prices of the storage.
        compression_ratio: fraction of their parameters to remove.
        keep_dense: names of matrices that stay as they are.
        projected: whether a point is scaled onto the budget.
        rank_multiple: ranks are rounded down to a multiple of it.
    """

    units: tuple[Unit, ...]
    compression_ratio: float
    keep_dense: tuple[str, ...] = ()
    projected: bool = True
    rank_multiple: int = 1

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the variables, in the order of the model."""
        return tuple(dict.fromkeys(module_group(unit.kind) for unit in self.units if unit.name not in self.keep_dense))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the variables for Optuna.

        Raises:
            ConfigError: nothing is left to search over.
        """
        if not self.groups:
            raise ConfigError("search: every matrix is kept dense; let the value projections be compressed, too.")
        return {group: FloatDistribution(LEAST, 1.0) for group in self.groups}

    @property
    def problem(self) -> AllocationProblem:
        return AllocationProblem(self.units, self.compression_ratio, frozenset(self.keep_dense))

    def allocation(self, point: Mapping[str, float], label: str = "sampled") -> RankAllocation:
        """Return the ranks at ``point`` (group -> kept fraction).

        Raises:
            BudgetError: the ratio can't be met.
        """
        wishes = {unit.name: point.get(module_group(unit.kind), 1.0) for unit in self.units}
        ranks = project(self.problem, wishes) if self.projected else self._published(wishes)
        return rounded_down(allocation_from_ranks(label, self.units, ranks), self.units, self.rank_multiple)

    def _published(self, kept: Mapping[str, float]) -> dict[str, int | None]:
        """Return ⌈k·m·n/(m + n)⌉, floored, for each unit, as the published code; a kept fraction of 1 is dense."""
        ranks: dict[str, int | None] = {}
        for unit in self.units:
            exact = kept[unit.name] * unit.d_out * unit.d_in / (unit.d_out + unit.d_in)
            dense = unit.name in self.keep_dense or kept[unit.name] >= 1
            ranks[unit.name] = None if dense else floored(min(unit.max_rank, math.ceil(exact)), self.rank_multiple)
        return ranks

    def constraints(self, allocation: RankAllocation) -> dict[str, float]:
        """Return by how much an allocation misses each bound; zero or less is feasible. Empty where every point is."""
        if self.projected:
            return {}
        removed = allocation.compression_ratio
        return {
            "removes too little": self.compression_ratio - removed,
            "removes too much": removed - self.compression_ratio - PUBLISHED_MARGIN,
        }

    def baseline(self, allocator: str) -> dict[str, float]:
        """Return the point that ``allocator`` is (its multipliers depend on the module type alone)."""
        rule = ALLOCATORS[allocator]
        assert isinstance(rule, ByMultipliers)
        wishes = rule.multipliers(self.units)
        if not self.projected:
            wishes = {name: max(LEAST, kept) for name, kept in kept_fractions(self.problem, wishes).items()}
        first = {module_group(unit.kind): wishes[unit.name] for unit in reversed(self.units) if unit.name not in self.keep_dense}
        return {group: first[group] for group in self.groups}

"""The search space: one multiplier for each group of matrices, projected onto the budget.

A point is a vector x of kept fractions in [LEAST, 1]; only their ratios matter. ``project`` scales it so that the budget is
spent exactly, so every trial is feasible. Bounds as in the paper's published code; groups ``5x1``: q and k together, o, gate,
up, down, shared by depth (other architectures: one variable for each module type).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.distributions import BaseDistribution, FloatDistribution

from lowrank_core.accounting import MatrixShape
from lowrank_core.allocation import ALLOCATORS, RankAllocation, module_group, project
from lowrank_core.errors import ConfigError

__all__ = ["BASELINES", "SearchSpace", "value_layers"]

LEAST = 0.2
BASELINES = ("uniform", "lord_manual")
"""Allocators that are enqueued as the first trials, so that the result is never worse than any of them."""


def value_layers(matrices: Sequence[MatrixShape]) -> tuple[str, ...]:
    """Return the names of the value projections."""
    return tuple(m.name for m in matrices if module_group(m.kind) == "v")


@dataclass(frozen=True)
class SearchSpace:
    """Variables of a search and what a point of them means.

    Attributes:
        matrices: every compressible matrix, with the prices of the basis.
        compression_ratio: fraction of their parameters to remove.
        keep_dense: names of matrices that stay as they are.
    """

    matrices: tuple[MatrixShape, ...]
    compression_ratio: float
    keep_dense: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the variables, in the order of the model."""
        return tuple(dict.fromkeys(module_group(m.kind) for m in self.matrices if m.name not in self.keep_dense))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the variables for Optuna.

        Raises:
            ConfigError: nothing is left to search over.
        """
        if not self.groups:
            raise ConfigError("search: every matrix is kept dense; let the value projections be compressed, too.")
        return {group: FloatDistribution(LEAST, 1.0) for group in self.groups}

    def allocation(self, point: Mapping[str, float], label: str = "sampled") -> RankAllocation:
        """Return the ranks at ``point`` (group -> kept fraction).

        Raises:
            BudgetError: the ratio can't be met.
        """
        wishes = {m.name: point.get(module_group(m.kind), 1.0) for m in self.matrices}
        return project(self.matrices, wishes, self.compression_ratio, keep_dense=self.keep_dense, allocator=label)

    def baseline(self, allocator: str) -> dict[str, float]:
        """Return the point that ``allocator`` is (its multipliers depend on the module type alone)."""
        wishes = ALLOCATORS[allocator].multipliers(self.matrices)
        first = {module_group(m.kind): wishes[m.name] for m in reversed(self.matrices) if m.name not in self.keep_dense}
        return {group: first[group] for group in self.groups}

"""From a dense model to a compressed one in one go: units, decompositions, ranks, layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowrank_core.accounting import Unit
from lowrank_core.allocation import ALLOCATORS, RankAllocation, allocate, rounded_down
from lowrank_core.bases import Basis, basis_named, with_beta
from lowrank_core.calibration import LayerStatistics
from lowrank_core.compression import CompressedModel, compress
from lowrank_core.config import CompressionConfig
from lowrank_core.decomposition import Bases, damping_of, error_curves, factorize, units_of
from lowrank_core.models.handle import ModelHandle
from lowrank_core.sequential import compress_sequentially
from lowrank_core.text.windows import WindowSet
from lowrank_core.units import value_layers

__all__ = ["Decomposed", "decompose"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decomposed:
    """A model whose units are decomposed: compressed at any ratio from here, without another decomposition.

    Attributes:
        handle: the dense model.
        statistics: what the decompositions rest on.
        config: how.
        units: every unit, alternatives included.
        bases: their nested factors.
    """

    handle: ModelHandle
    statistics: LayerStatistics
    config: CompressionConfig
    units: tuple[Unit, ...]
    bases: Bases

    @property
    def basis(self) -> Basis:
        return with_beta(basis_named(self.config.basis), self.config.drift_beta)

    @property
    def keep_dense(self) -> tuple[str, ...]:
        return value_layers(self.handle.shapes) if self.config.value_dense else ()

    def allocate(self, allocator: str, compression_ratio: float) -> RankAllocation:
        """Spend the budget of ``compression_ratio``.

        Raises:
            ConfigError: no such allocator, or it can't choose between the alternatives of the config.
            BudgetError: the ratio can't be met.
        """
        found = allocate(allocator, self.units, compression_ratio, keep_dense=self.keep_dense, curves=error_curves(self.bases))
        return rounded_down(found, self.units, self.config.rank_multiple)

    def warnings(self, allocator: str) -> tuple[str, ...]:
        """Return what a user should know before trusting an allocation."""
        found = []
        if allocator in ALLOCATORS and ALLOCATORS[allocator].needs_curves and not self.basis.comparable:
            found.append(
                f"{allocator} trades errors of one matrix for another's, and {self.basis.label} measures each in its own unit. "
                "The basis two_sided makes them comparable."
            )
        singular = [basis for basis in self.bases.values() if math.isinf(basis.condition)]
        if singular:
            found.append(
                f"{len(singular)} of {len(self.bases)} input metrics are singular (dead or duplicated features, or fewer tokens than "
                f"dimensions; the first: {singular[0].unit.name}). Damped by {self.config.input_damping:g} of the mean eigenvalue."
            )
        return tuple(found)

    def compress(self, allocation: RankAllocation, calibration: WindowSet, *, progress: Progress | None = None) -> CompressedModel:
        """Return the smaller model; a sequential basis is fitted block by block on ``calibration``.

        Raises:
            ConfigError, RankError, NumericalError: as ``compress`` and ``compress_sequentially``.
        """
        if not self.basis.sequential:
            return compress(self.handle, self.bases, allocation)
        return compress_sequentially(
            self.handle,
            calibration.first(self.config.fit_windows),
            self.statistics,
            self.bases,
            allocation,
            self.basis,
            damping=damping_of(self.config),
            progress=progress,
        )


def decompose(
    handle: ModelHandle, statistics: LayerStatistics, config: CompressionConfig, *, progress: Progress | None = None
) -> Decomposed:
    """Decompose every unit of ``handle`` under ``config``.

    Raises:
        ConfigError: no such basis, or it needs gradients that were not collected.
        NumericalError: NaN, Inf or no convergence; names the layer.
    """
    units = units_of(handle, config)
    return Decomposed(handle, statistics, config, units, factorize(handle, statistics, units, config, progress=progress))

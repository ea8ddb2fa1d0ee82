"""A model whose units are decomposed: what is left to choose is ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from lowrank_core.allocation import (
    ALLOCATORS,
    AllocationProblem,
    ErrorCurves,
    Perplexities,
    RankAllocation,
    Ranks,
    allocate,
    round_ranks_down,
)
from lowrank_core.allocation.units import dense_layers
from lowrank_core.compression.build import CompressedModel, compress, low_rank_layers, swap_layers
from lowrank_core.compression.sequential import compress_sequentially
from lowrank_core.config import CompressionConfig
from lowrank_core.decomposition.store import cached_bases
from lowrank_core.decomposition.units import Bases, damping_of, error_curves, factorize, units_of
from lowrank_core.metrics import ErrorMetric, metric_of
from lowrank_core.models.experts import experts_of
from lowrank_core.models.handle import ModelHandle
from lowrank_core.parameters import Unit
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["Decomposed", "decompose"]


@dataclass(frozen=True)
class Decomposed:
    """A model whose units are decomposed: compressed at any ratio from here, without another decomposition.

    Attributes:
        handle: the dense model.
        statistics: what the decompositions rest on.
        config: how.
        units: every unit, alternatives included.
        bases: nested factors by unit.
    """

    handle: ModelHandle
    statistics: LayerStatistics
    config: CompressionConfig
    units: tuple[Unit, ...]
    bases: Bases

    @property
    def basis(self) -> ErrorMetric:
        return metric_of(self.config)

    @cached_property
    def curves(self) -> ErrorCurves:
        """e_0 … e_k of every unit."""
        return error_curves(self.bases)

    @property
    def keep_dense(self) -> tuple[str, ...]:
        return dense_layers(self.units, self.config)

    def problem(self, compression_ratio: float, *, fixed: Ranks | None = None) -> AllocationProblem:
        """Return what an allocator would be given.

        Raises:
            ConfigError, RankError: as ``allocate``.
        """
        return AllocationProblem(
            self.units,
            compression_ratio,
            frozenset(self.keep_dense),
            self.curves,
            fixed or {},
            influence=self.statistics.influence,
        )

    def allocate(
        self,
        allocator: str,
        compression_ratio: float,
        *,
        fixed: Ranks | None = None,
        weights: Mapping[str, float] | None = None,
        perplexities: Perplexities | None = None,
    ) -> RankAllocation:
        """Spend the budget of ``compression_ratio``.

        Args:
            fixed: ranks by unit that the user chose; neither the allocator nor ``rank_multiple`` changes them.
            weights: positive, on the errors of units (``measure_error_weights``), for an allocator that trades them; those of ``lems``
                are a ``LemsMeasurement``'s.
            perplexities: as ``perplexities_for`` measures them for an allocator that needs them.

        Raises:
            ConfigError: no such allocator, it can't choose between the alternatives of the config, or it needs the influence of the
                blocks and the statistics have none, or perplexities that were not given; or ``fixed`` or ``weights`` are not those of
                the units.
            RankError: a fixed rank outside its limits.
            BudgetError: the ratio can't be met.
        """
        result = allocate(
            allocator,
            self.units,
            compression_ratio,
            keep_dense=self.keep_dense,
            curves=self.curves,
            fixed=fixed,
            weights=weights,
            influence=self.statistics.influence,
            perplexities=perplexities,
            rank_multiple=self.config.rank_multiple,
        )
        return round_ranks_down(result, self.units, self.config.rank_multiple)

    def warnings(self, allocator: str, *, weighted: bool = False) -> tuple[str, ...]:
        """Return warnings on an allocation; ``weighted``: by measured error weights."""
        result = []
        if allocator in ALLOCATORS and ALLOCATORS[allocator].trades_errors and not (self.basis.comparable or weighted):
            result.append(
                f"{allocator} trades errors of one matrix for another's, and {self.basis.label} measures each in its own unit. "
                "The basis two_sided makes them comparable."
            )
        if self.config.modules and self.keep_dense:
            result.append(
                f"{len(self.keep_dense)} matrices are in no module that can be reduced, and stay dense (the first: {self.keep_dense[0]})."
            )
        untold = [name for name, mixture in experts_of(self.handle.module) if not mixture.tells_rows]
        if self.basis.sequential and untold:
            result.append(
                f"{len(untold)} mixtures of experts (the first: {untold[0]}) are compressed as the dense model runs them, not fitted to "
                "the error of the layers before them: they don't say which tokens their rows are."
            )
        singular = [basis for basis in self.bases.values() if math.isinf(basis.condition)]
        if singular:
            result.append(
                f"{len(singular)} of {len(self.bases)} input metrics are singular (dead or duplicated features, or fewer tokens than "
                f"dimensions; the first: {singular[0].unit.name}). Damped by {self.config.input_damping:g} of the mean eigenvalue."
            )
        return tuple(result)

    def swapped(self, ranks: Ranks) -> AbstractContextManager[None]:
        """Put plain factors at ``ranks`` into the model, everything else dense; afterwards the very same dense layers are back.

        Layers of units whose rank was the same the time before are used again.

        Raises:
            ConfigError, RankError: they are not ranks of these units.
        """
        built = {name: self._built[name] for name, rank in ranks.items() if name in self._built and self._built[name][0] == rank}
        for name, rank in ranks.items():
            if rank is not None and name not in built:
                built[name] = rank, low_rank_layers(self.handle, self.bases, {name: rank}, storage="factored")
        self._built.clear()
        self._built.update(built)
        return swap_layers(self.handle, {name: layer for _, layers in built.values() for name, layer in layers.items()})

    @cached_property
    def _built(self) -> dict[str, tuple[int, Mapping[str, nn.Module]]]:
        """Rank and layers of the units that were put in last."""
        return {}

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
    handle: ModelHandle,
    statistics: LayerStatistics,
    config: CompressionConfig,
    *,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Decomposed:
    """Decompose every unit of ``handle`` under ``config``.

    Args:
        store: folder that keeps the factors of stored statistics on disk (``cached_bases``); in memory without one.

    Raises:
        ConfigError: no such basis, or it needs gradients that were not collected.
        NumericalError: NaN, Inf or no convergence; names the layer.
    """
    units = units_of(handle, config)
    if store is None:
        return Decomposed(handle, statistics, config, units, factorize(handle, statistics, units, config, progress=progress))
    return Decomposed(handle, statistics, config, units, cached_bases(handle, statistics, units, config, store, progress=progress))

"""Plan of a sensitivity measurement: cells with their ranks. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_core.allocation.units import plan_units
from lowrank_core.config import CompressionConfig
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.sensitivity.config import MODULE, TYPE, SensitivityConfig, coarse_first

__all__ = ["CellKey", "PlannedCell", "planned_cells"]

CellKey = tuple[str, str, float]
"""Scope, name, and the kept ratio that was asked for."""


@dataclass(frozen=True)
class PlannedCell:
    """One measurement: these matrices at these ranks, everything else dense.

    Attributes:
        scope: ``module`` or ``type``; name: of the matrix, or of the type.
        kept: ratio that was asked for.
        ranks: by matrix: the largest that cost at most so much, at least 1.
        parameters, dense_parameters: of these matrices, compressed and dense.
    """

    scope: str
    name: str
    kept: float
    ranks: Mapping[str, int]
    parameters: int
    dense_parameters: int

    @property
    def key(self) -> CellKey:
        return self.scope, self.name, self.kept


def planned_cells(shapes: Sequence[MatrixShape], compression: CompressionConfig, config: SensitivityConfig) -> tuple[PlannedCell, ...]:
    """Return the cells of ``config`` in the order of measuring: ratio by ratio, the middle one first; types before modules.

    Matrices that no rank makes smaller are left out, and types that have no other.

    Args:
        compression: of single matrices (``single_compression``).

    Raises:
        ConfigError: the model has no such type.
    """
    units = [unit for unit in plan_units(shapes, compression) if unit.break_even_rank > 0]
    kinds = list(dict.fromkeys(shape.kind for shape in shapes))
    unknown = [kind for kind in config.kinds if kind not in kinds]
    if unknown:
        raise ConfigError(f"this model has no module type {unknown[0]!r}; it has {', '.join(kinds)}.")
    wanted = config.kinds or kinds
    groups = [(TYPE, kind, [unit for unit in units if unit.kind == kind]) for kind in wanted] if TYPE in config.scopes else []
    if MODULE in config.scopes:
        groups += [(MODULE, unit.name, [unit]) for unit in units if unit.kind in wanted]
    return tuple(_planned(scope, name, kept, members) for kept in coarse_first(config.kept) for scope, name, members in groups if members)


def _planned(scope: str, name: str, kept: float, units: Sequence[Unit]) -> PlannedCell:
    ranks: dict[str, int] = {}
    for unit in units:
        rank = unit.rank_for_parameters(kept * unit.dense_parameters)
        assert rank is not None  # kept < 1, and some rank is smaller than dense
        ranks[unit.name] = rank
    return PlannedCell(
        scope, name, kept, ranks, sum(unit.parameters(ranks[unit.name]) for unit in units), sum(unit.dense_parameters for unit in units)
    )

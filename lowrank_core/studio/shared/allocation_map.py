"""Maps and table of an allocation."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lowrank_core.allocation import RankAllocation, allocation_from_ranks
from lowrank_core.allocation.curves import CurveRecord
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.manual.expected_kl import predicted_kl
from lowrank_core.studio.shared.formatting import number, percent
from lowrank_core.studio.shared.layer_map import LayerMap, layer_map
from lowrank_core.studio.shared.trial_names import unit_label

__all__ = ["allocation_map", "allocation_of", "loss_map", "rank_table"]


def allocation_of(trial: TrialRecord, units: Sequence[Unit]) -> RankAllocation:
    """Return the allocation of a trial.

    Raises:
        ConfigError: its ranks do not fit ``units``.
    """
    return allocation_from_ranks(f"trial {trial.number}", units, trial.ranks)


def allocation_map(allocation: RankAllocation, units: Sequence[Unit]) -> LayerMap:
    """Return the kept fraction of each matrix's parameters, 1 where it stays dense, that of its unit where it shares a rank.

    A matrix that no rank covers is dense; each is there once.
    """
    cells = _cells(allocation, units)
    kept = [_kept(unit, rank) for _, unit, rank in cells]
    labels = [_words(unit, rank) for _, unit, rank in cells]
    return layer_map([matrix for matrix, _, _ in cells], kept, labels, "Parameters kept", percent=True, full_scale=True)


def _cells(allocation: RankAllocation, units: Sequence[Unit]) -> list[tuple[MatrixShape, Unit | None, int | None]]:
    """Return each matrix with the unit whose rank covers it, and that rank; None where no rank does."""
    known = {unit.name: unit for unit in units}
    covered = {member.name: known[name] for name in allocation.ranks for member in known[name].members}
    matrices = {member.name: member for unit in units for member in unit.members}.values()
    chosen = [(matrix, covered.get(matrix.name)) for matrix in matrices]
    return [(matrix, unit, None if unit is None else allocation.ranks[unit.name]) for matrix, unit in chosen]


def _kept(unit: Unit | None, rank: int | None) -> float:
    return 1.0 if unit is None else unit.parameters(rank) / unit.dense_parameters


def _words(unit: Unit | None, rank: int | None) -> str:
    if unit is None or rank is None:
        return "dense"
    words = f"rank {rank}, {percent(_kept(unit, rank), 0)} kept"
    if len(unit.members) == 1:
        return words
    return f"{words} of {unit_label(unit.name)}, {unit.words}"


def loss_map(allocation: RankAllocation, units: Sequence[Unit], record: CurveRecord) -> LayerMap:
    """Return the share of each matrix in the predicted KL divergence, that of its unit where it shares a rank; 0 where it stays dense."""
    cells, total = _cells(allocation, units), predicted_kl(record, allocation.ranks) or 0.0
    errors = [(record.error(unit.name, rank) if unit is not None else 0.0) or 0.0 for _, unit, rank in cells]
    shares = [error / total if total > 0 else 0.0 for error in errors]
    labels = [f"{_words(unit, rank)}; {number(error)} predicted" for (_, unit, rank), error in zip(cells, errors, strict=True)]
    return layer_map([matrix for matrix, _, _ in cells], shares, labels, "Share of the predicted ΔKL", percent=True)


def rank_table(allocation: RankAllocation, units: Sequence[Unit]) -> pd.DataFrame:
    """Return a row for each unit that ``allocation`` uses: name, layer, rank (missing: dense), most, locked.

    ``most`` is the largest rank that costs less than the dense matrices.
    """
    known = {unit.name: unit for unit in units}
    frame = pd.DataFrame(
        {
            "name": list(allocation.ranks),
            "layer": [unit_label(name) for name in allocation.ranks],
            "rank": pd.Series(list(allocation.ranks.values()), dtype="Int64"),
            "most": [known[name].break_even_rank for name in allocation.ranks],
            "locked": [name in allocation.locked for name in allocation.ranks],
        }
    )
    return frame.set_index("name")

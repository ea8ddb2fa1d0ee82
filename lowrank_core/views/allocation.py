"""What a trial, or a user, allocates: the map of it, a table to edit, and what it costs against the budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.accounting import HeadUnit, MatrixShape, Unit, budget_for_ratio, dense_parameters
from lowrank_core.allocation import AllocationFile, AllocationProblem, RankAllocation, Ranks, allocation_from_ranks
from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.errors import RankError
from lowrank_core.search.records import MANUAL, TrialRecord
from lowrank_core.units import check_reachable, plan_units, value_layers
from lowrank_core.views.formatting import percent
from lowrank_core.views.layermap import LayerMap, layer_map
from lowrank_core.views.trials import unit_label

__all__ = ["Cost", "allocation_map", "allocation_of", "cost_of", "picked_file", "rank_table", "search_units", "trial_of_ranks"]


def search_units(matrices: Sequence[MatrixShape], compression: CompressionConfig, heads: Sequence[HeadUnit] = ()) -> tuple[Unit, ...]:
    """Return what a search with ``compression`` gives ranks to, alternatives included; ``heads`` are those of the model."""
    return plan_units(matrices, compression, heads)


def allocation_of(trial: TrialRecord, units: Sequence[Unit]) -> RankAllocation:
    """Return what a trial allocated.

    Raises:
        ConfigError: its ranks do not fit ``units``.
    """
    return allocation_from_ranks(f"trial {trial.number}", units, trial.ranks)


def allocation_map(allocation: RankAllocation, units: Sequence[Unit]) -> LayerMap:
    """Return the kept fraction of each matrix's parameters, 1 where it stays dense, that of its unit where it shares a rank.

    A matrix that no rank covers is dense; each is there once.
    """
    known = {unit.name: unit for unit in units}
    covered = {member.name: name for name in allocation.ranks for member in known[name].members}
    matrices = list({member.name: member for unit in units for member in unit.members}.values())
    kept, labels = [], []
    for matrix in matrices:
        unit = known.get(covered.get(matrix.name, ""))
        rank = None if unit is None else allocation.ranks[unit.name]
        kept.append(1.0 if unit is None else unit.parameters(rank) / unit.dense_parameters)
        labels.append(_words(unit, rank, kept[-1]))
    return layer_map(matrices, kept, labels, "Parameters kept", percent=True, full_scale=True)


def _words(unit: Unit | None, rank: int | None, share: float) -> str:
    if unit is None or rank is None:
        return "dense"
    words = f"rank {rank}, {percent(share, 0)} kept"
    if len(unit.members) == 1:
        return words
    return f"{words} of {unit_label(unit.name)}, {'by heads' if isinstance(unit, HeadUnit) else 'as one stack'}"


def rank_table(allocation: RankAllocation, units: Sequence[Unit]) -> pd.DataFrame:
    """Return a row for each unit that ``allocation`` uses, to be edited: name, layer, rank (missing: dense), most, locked.

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


def picked_file(frame: pd.DataFrame) -> AllocationFile:
    """Return what was entered in a ``rank_table``.

    Raises:
        RankError: a rank that is no whole number from 1 up.
    """
    ranks: dict[str, int | None] = {}
    for name, rank in frame["rank"].items():
        if not pd.isna(rank) and (int(rank) != rank or rank < 1):
            raise RankError(f"{name}: rank {rank:g} is no whole number from 1 up. Leave the cell empty to keep the layer dense.")
        ranks[str(name)] = None if pd.isna(rank) else int(rank)
    return AllocationFile(ranks, tuple(str(name) for name, locked in frame["locked"].items() if locked))


@dataclass(frozen=True)
class Cost:
    """What an allocation keeps, against what the search may keep.

    Attributes:
        kept: parameters of the compressible linears. With ``completed``, those of locked and dense layers only.
        allowed: the budget; None for a search over a range of ratios.
        dense: parameters of the linears as they are.
        completed: whether an allocator spends the rest of the budget.
    """

    kept: int
    allowed: int | None
    dense: int
    completed: bool

    @property
    def fits(self) -> bool:
        return self.allowed is None or self.kept <= self.allowed

    @property
    def share(self) -> float:
        """Kept of allowed, at most 1, for a meter; of the dense model without a budget."""
        return min(1.0, self.kept / max(1, self.dense if self.allowed is None else self.allowed))

    @property
    def removed(self) -> float:
        """Fraction of the linears' parameters that is removed."""
        return 1 - self.kept / max(1, self.dense)


def cost_of(picked: AllocationFile, units: Sequence[Unit], search: SearchConfig, *, completed: bool) -> Cost:
    """Return what ``picked`` costs; ``completed`` says that an allocator chooses what is not locked.

    Raises:
        ConfigError, RankError: the ranks do not fit the model.
        BudgetError: nothing that completes them meets the budget.
    """
    dense, allowed = dense_parameters(units), budget_for_ratio(units, search.compression_ratio)
    if not completed:
        kept = allocation_from_ranks(MANUAL, units, picked.ranks).parameters
        return Cost(kept, None if search.most_ratio is not None else allowed, dense, completed=False)
    check_reachable(units, search.compression_ratio, search.compression, fixed=picked.fixed)
    stay = _dense_values(units, search.compression)
    problem = AllocationProblem(tuple(units), search.compression_ratio, frozenset(stay), fixed=picked.fixed)
    return Cost(problem.committed, allowed, dense, completed=True)


def _dense_values(units: Sequence[Unit], compression: CompressionConfig) -> Collection[str]:
    shapes = {member.name: member for unit in units for member in unit.members}
    return value_layers(list(shapes.values())) if compression.value_dense else ()


def trial_of_ranks(trials: Sequence[TrialRecord], ranks: Ranks) -> TrialRecord | None:
    """Return the newest hand-picked trial with these ranks, or None."""
    wanted: Mapping[str, int | None] = dict(ranks)
    return next((trial for trial in reversed(trials) if trial.label == MANUAL and dict(trial.ranks) == wanted), None)

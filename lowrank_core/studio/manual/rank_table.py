"""Tables of a rank draft: rows, cost against a budget, groups for sliders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.allocation import Draft
from lowrank_core.allocation.curves import CurveRecord
from lowrank_core.errors import RunError
from lowrank_core.parameters import Unit, budget_for_ratio, compression_ratio, dense_parameters
from lowrank_core.studio.shared.formatting import kind_label
from lowrank_core.studio.shared.model_facts import ModelFacts
from lowrank_core.studio.shared.trial_names import unit_label

__all__ = ["Bill", "RowEdit", "RowGroup", "bill", "dense_words", "draft_rows", "edited_draft", "groupings", "row_groups"]

_ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_DEPTH_GROUPS = 3


def _kind(unit: Unit) -> str:
    return "+".join(kind_label(part) for part in unit.kind.split("+"))


def draft_rows(draft: Draft, record: CurveRecord | None) -> pd.DataFrame:
    """Return a row for each unit of ``draft``, by name, to be edited.

    Columns: module, kind, blocks, shape, rank (missing: dense), most (the largest rank that costs less than dense), kept (percent of
    its parameters), energy (fraction of the energy, in the basis' metric; missing where unknown), kl (its predicted part of the KL
    divergence in nats per token; missing where errors predict none), locked.
    """
    rows, ranks = draft.rows, draft.ranks
    predicts = record is not None and record.predicts
    frame = pd.DataFrame(
        {
            "name": [unit.name for unit in rows],
            "module": [unit_label(unit.name) for unit in rows],
            "kind": [_kind(unit) for unit in rows],
            "block": [unit.depth for unit in rows],
            "shape": [unit.size_words for unit in rows],
            "rank": pd.Series([ranks[unit.name] for unit in rows], dtype="Int64"),
            "most": [unit.break_even_rank for unit in rows],
            "kept": [round(100 * draft.kept([unit.name]), 1) for unit in rows],
            "energy": pd.Series([record.energy(u.name, ranks[u.name]) if record else None for u in rows], dtype=float),
            "kl": pd.Series([record.error(u.name, ranks[u.name]) if record and predicts else None for u in rows], dtype=float),
            "locked": [unit.name in draft.locked for unit in rows],
        }
    )
    return frame.set_index("name")


@dataclass(frozen=True)
class RowEdit:
    """Edited cells of a row of ``draft_rows``."""

    name: str
    cells: Mapping[str, object]

    @property
    def is_ratio(self) -> bool:
        return "kept" in self.cells


def edited_draft(draft: Draft, edits: Sequence[RowEdit]) -> Draft:
    """Return ``draft`` with the edits: unlocks, then ranks, kept percentages, locks.

    Raises:
        RankError: a rank or a ratio outside its limits, or of a locked row.
    """
    for edit in edits:
        cells = edit.cells
        if cells.get("locked") is False:
            draft = draft.with_locks([edit.name], locked=False)
        if "kept" in cells:
            kept = cells["kept"]
            draft = draft.with_kept(edit.name, 1.0 if kept is None else float(str(kept)) / 100)
        elif "rank" in cells:
            rank = cells["rank"]
            draft = draft.with_rank(edit.name, None if rank is None else int(str(rank)))
        if cells.get("locked") is True:
            draft = draft.with_locks([edit.name], locked=True)
    return draft


def dense_words(units: Sequence[Unit], edit: RowEdit) -> str:
    """Return a note if the entered rank is stored dense because its factors cost no less; else empty."""
    unit = next((unit for unit in units if unit.name == edit.name), None)
    rank = edit.cells.get("rank")
    if unit is None or type(rank) is not int or not unit.break_even_rank < rank <= unit.max_rank:
        return ""
    return (
        f"{unit_label(edit.name)}: rank {rank} would cost {unit.parameters(rank):,} parameters, no less than the "
        f"{unit.dense_parameters:,} of the dense matrix, so it stays dense. Factors are smaller up to rank {unit.break_even_rank}."
    )


@dataclass(frozen=True)
class RowGroup:
    """Rows moved by one slider.

    Attributes:
        key: of the group, unlike any other's.
        label: what a user reads.
        names: of its rows, locked ones left out.
        kept: percent of their parameters that these keep together, at least 1.
        locked: how many rows of the group are locked.
    """

    key: str
    label: str
    names: tuple[str, ...]
    kept: int
    locked: int


def row_groups(draft: Draft) -> tuple[list[RowGroup], list[RowGroup]]:
    """Return the rows by module type, and by thirds of the depth."""
    kinds = list(dict.fromkeys(_kind(unit) for unit in draft.rows))
    by_type = [_group(draft, f"type-{kind}", kind, [u for u in draft.rows if _kind(u) == kind]) for kind in kinds]
    blocks = 1 + max((unit.depth for unit in draft.rows), default=0)
    count = min(_DEPTH_GROUPS, blocks)
    by_depth = []
    for group in range(count):
        rows = [unit for unit in draft.rows if unit.depth * count // blocks == group]
        first, last = (min(u.depth for u in rows), max(u.depth for u in rows)) if rows else (0, 0)
        label = f"Blocks {first} to {last}" if last > first else f"Block {first}"
        by_depth.append(_group(draft, f"depth-{group}", label, rows))
    return by_type, by_depth


def _group(draft: Draft, key: str, label: str, rows: Sequence[Unit]) -> RowGroup:
    names = [unit.name for unit in rows]
    free = tuple(unit.name for unit in draft.movable(names))
    return RowGroup(key, label, free, max(1, round(100 * draft.kept(free))), sum(name in draft.locked for name in names))


def groupings(draft: Draft, module: str) -> dict[str, str]:
    """Return unit -> label for every unit of the matrix ``module``, the current one first."""
    result = {unit.name: _grouping_words(unit) for unit in draft.alternatives(module)}
    return dict(sorted(result.items(), key=lambda pair: pair[0] not in draft.ranks))


def _grouping_words(unit: Unit) -> str:
    if len(unit.members) == 1:
        return "alone"
    return f"{unit_label(unit.name)}, {unit.words}"


@dataclass(frozen=True)
class Bill:
    """Cost of a draft, the dense model and a budget, counted before compression.

    Attributes:
        kept, dense: parameters of the compressible linears.
        allowed: the budget for them.
        run_allowed: the budget that the run's trials must meet; None for a search over a range of ratios.
        bytes, dense_bytes: of the whole model in the dtype that is written.
        flops, dense_flops: for one token, as ``FLOPS_MEANING`` says.
        model, dense_model: parameters of the whole model.
        step: the lowest cost of one more rank of an unlocked row; None where nothing may.
    """

    kept: int
    dense: int
    allowed: int
    run_allowed: int | None
    bytes: int
    dense_bytes: int
    flops: int
    dense_flops: int
    model: int
    dense_model: int
    step: int | None

    @property
    def left(self) -> int:
        """Unspent budget; negative over it."""
        return self.allowed - self.kept

    @property
    def share(self) -> float:
        """Kept over allowed, at most 1."""
        return min(1.0, self.kept / max(1, self.allowed))

    @property
    def removed(self) -> float:
        return compression_ratio(self.dense, self.kept)

    @property
    def model_removed(self) -> float:
        return compression_ratio(self.dense_model, self.model)

    @property
    def spent(self) -> bool:
        """Whether the budget is met and no further rank fits."""
        return self.left >= 0 and (self.step is None or self.left < self.step)

    @property
    def counts(self) -> bool:
        """Whether a trial of it can become the run's best."""
        return self.run_allowed is None or self.kept <= self.run_allowed


def bill(draft: Draft, facts: ModelFacts, compression_ratio: float, *, run_ratio: float | None) -> Bill:
    """Return the cost of ``draft`` at ``compression_ratio``; ``run_ratio`` is the run's own, None for a range.

    Raises:
        BudgetError: a ratio outside [0, 1).
        RunError: the model's dtype is unknown.
    """
    itemsize = _ITEMSIZES.get(facts.stored_dtype or facts.dtype)
    if itemsize is None:
        raise RunError(f"model.json names the dtype {facts.stored_dtype or facts.dtype!r}, whose bytes are not known here.")
    rows, ranks, dense, kept = draft.rows, draft.ranks, dense_parameters(draft.units), draft.parameters
    matrices = {member.name: Unit((member,)) for unit in draft.units for member in unit.members}.values()
    flops = facts.flops_of_head + sum(matrix.flops_per_token(None) for matrix in matrices)
    saved = sum(unit.bytes(None, itemsize) - unit.bytes(ranks[unit.name], itemsize) for unit in rows)
    return Bill(
        kept=kept,
        dense=dense,
        allowed=budget_for_ratio(draft.units, compression_ratio),
        run_allowed=None if run_ratio is None else budget_for_ratio(draft.units, run_ratio),
        bytes=facts.bytes - saved,
        dense_bytes=facts.bytes,
        flops=flops + sum(unit.flops_per_token(ranks[unit.name]) - unit.flops_per_token(None) for unit in rows),
        dense_flops=flops,
        model=facts.parameters - dense + kept,
        dense_model=facts.parameters,
        step=min((step for unit in draft.movable() if (step := _next_step(unit, ranks[unit.name])) is not None), default=None),
    )


def _next_step(unit: Unit, rank: int | None) -> int | None:
    if rank is None:
        return None
    following = rank + 1 if rank < unit.break_even_rank else None
    return unit.parameters(following) - unit.parameters(rank)

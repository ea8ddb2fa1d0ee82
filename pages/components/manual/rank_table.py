"""Editable rank table, with sliders for groups of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from lowrank_core.allocation import Draft
from lowrank_core.studio.manual.rank_table import RowEdit, RowGroup, dense_words, draft_rows, edited_draft, row_groups
from pages.components import state
from pages.components.manual.draft_state import DraftState, edit, history, note, revision, say

__all__ = ["sliders", "table"]

_MAX_EXPERT_ROWS = 48
"""Rows of experts that a table shows unless a user hides them."""


def sliders(editor: DraftState, draft: Draft) -> None:
    """Draw a slider for the kept ratio of every module type and depth third."""
    by_type, by_depth = row_groups(draft)
    st.markdown("**Keep by type**")
    for group in by_type:
        _slider(editor, draft, group)
    st.markdown("**Keep by depth**")
    for group in by_depth:
        _slider(editor, draft, group)
    st.caption("A slider scales its unlocked rows in proportion; locked rows never move.")


def _slider(editor: DraftState, draft: Draft, group: RowGroup) -> None:
    key = editor.key(f"slide_{group.key}")
    asked, then = state.held(_asked(key), (group.kept, draft))
    # What was asked for by this slider, as long as nothing else changed: whole ranks may come to a percent more or less.
    shown = asked if then == draft else group.kept
    name = state.control(key, shown)
    locked = f" {group.locked} rows are locked." if group.locked else ""
    words = f"Percent of parameters kept by the unlocked rows of {group.label} together.{locked}"
    st.slider(
        group.label,
        1,
        100,
        key=name,
        format="%d %%",
        disabled=not group.names,
        on_change=_slid,
        args=(editor, (key, name), group, shown),
        help=words if group.names else f"All rows are locked.{locked}",
    )


def _asked(key: str) -> str:
    return f"{key}_asked"


def _slid(editor: DraftState, keys: tuple[str, str], group: RowGroup, shown: int) -> None:
    key, name = keys
    kept = state.held(name, shown)
    if kept == shown:  # when the page is left, Streamlit calls although nobody moved it
        return
    edit(editor, lambda draft: draft.scaled(group.names, kept / 100), gesture=key)
    if not note(editor):
        state.keep(_asked(key), (kept, history(editor).present))


def table(editor: DraftState, draft: Draft) -> None:
    """Draw a row per unit with editable rank, kept ratio and lock; those of experts on demand."""
    frame = draft_rows(draft, editor.recipe.record)
    experts = [unit.name for unit in draft.rows if unit.members[0].expert is not None]
    if experts and not _with_experts(editor, len(experts)):
        frame = frame.drop(index=experts)
    columns: dict[str, Any] = {
        "module": st.column_config.TextColumn(
            "Module", width=90, help="Block and module type, e3 for expert 3; a stack, or a value and an output by heads, share one rank."
        ),
        "kind": st.column_config.TextColumn("Type", width=92),
        "block": st.column_config.NumberColumn("Block", width=48),
        "shape": st.column_config.TextColumn("Shape", width=92),
        "rank": st.column_config.NumberColumn("Rank", min_value=1, step=1, width=68, help="Empty: the row stays dense."),
        "kept": st.column_config.NumberColumn(
            "Kept %",
            min_value=0,
            max_value=100,
            format="%.1f",
            width=76,
            help="Of its parameters. Enter one to get the largest rank within it.",
        ),
        "locked": st.column_config.CheckboxColumn("Lock", width=66, help="A locked row is moved by no slider and no fit."),
        "energy": st.column_config.NumberColumn(
            "Energy", format="%.5f", width=75, help="Retained at this rank, in the run's error metric; 1 is all. Not a loss."
        ),
        "kl": st.column_config.NumberColumn(
            "Predicted ΔKL", format="%.2e", width=100, help="This row's share of the predicted KL, nats per token."
        ),
        "most": st.column_config.NumberColumn(
            "Most",
            width=58,
            help="The break-even rank: the largest that costs less than dense. Above it a row is stored dense.",
        ),
    }
    shown = [name for name in columns if not (name in ("energy", "kl") and frame[name].isna().all())]
    key = _table_key(editor)
    st.data_editor(
        frame,
        column_order=shown,
        column_config=columns,
        disabled=[name for name in frame.columns if name not in ("rank", "kept", "locked")],
        hide_index=True,
        height=430,
        key=key,
        placeholder="dense",
        on_change=_edited,
        args=(editor, key, list(frame.index)),
        alt="Rank, kept ratio, energy and lock of every row, to be edited",
    )


def _with_experts(editor: DraftState, rows: int) -> bool:
    return st.toggle(
        f"Show the {rows:,} rows of experts",
        key=editor.key("expert_rows"),
        value=rows <= _MAX_EXPERT_ROWS,
        help="The sliders by type move them all together, shown or not.",
    )


def _table_key(editor: DraftState) -> str:
    """Return the key of the table as it is shown now: another one for other rows."""
    experts = "_experts" if state.held(editor.key("expert_rows"), False) else ""
    return editor.key(f"table_{revision(editor)}{experts}")


def _edited(editor: DraftState, key: str, names: Sequence[str]) -> None:
    if key != _table_key(editor):  # a table that is gone
        return
    edited: dict[str, Any] = state.held(key, {})
    edits = [RowEdit(names[int(row)], cells) for row, cells in edited.get("edited_rows", {}).items()]
    dense = [words for entered in edits if (words := dense_words(editor.recipe.units, entered))]
    # The table goes on showing what was entered: a ratio, or a rank that became dense, has to be shown as what it came to.
    snapped = bool(dense) or any(entered.is_ratio for entered in edits)
    edit(editor, lambda draft: edited_draft(draft, edits), keep_table=not snapped)
    if dense and not note(editor):
        say(editor, "", hint=" ".join(dense))

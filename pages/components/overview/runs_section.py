"""Runs: select, compare, rename, annotate, delete."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypedDict

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.runs.manage import check_deletable, delete_run, notes_of, rename_run, run_bytes, write_notes
from lowrank_core.studio.overview.run_comparison import compare_runs
from lowrank_core.studio.shared.formatting import size
from lowrank_core.studio.shared.run_list import run_table
from lowrank_core.studio.shared.table import Column, Table
from pages.components import state, tables
from pages.components.boundary import boundary

__all__ = ["show"]


class _Guard(TypedDict):
    disabled: bool
    help: str | None


_RECORDED = "This run ships with the package and is read-only."


def show(runs: Sequence[Run], shown: Run | None) -> None:
    """List ``runs``, with actions on the selected ones or the current run."""
    if not runs or shown is None:
        return
    st.subheader("Runs", anchor=False)
    picked = _table(runs)
    st.caption("Select a row to open that run on every page, several rows to compare them.")
    if len(picked) > 1:
        _comparison(picked)
        _delete_button(picked)
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"**{shown.record['name']}**", width="content")
        _rename(shown)
        _notes(shown)
        _delete_button([shown])


def _table(runs: Sequence[Run]) -> list[Run]:
    frame = run_table(runs)
    columns = (
        Column.text("name", "Name", width=330),
        Column.text("state", "State"),
        Column.text("ratio", "Removed", "Target compression ratio of the search, or its range."),
        Column.whole("trials", "Trials complete"),
        Column.number("best", "Best value"),
        Column("created", "Started", "ago"),
        Column.text("notes", "Notes", width=220),
    )
    ids = list(frame["id"])
    key = f"runs_table_{zlib.crc32(' '.join(ids).encode()):08x}"  # rows of another list of runs are not those that were picked
    tables.show(Table(frame, columns, "Runs, the newest first"), key=key, on_pick=state.pick_from_table("run", key, ids), several=True)
    known = {run.id: run for run in runs}
    return [known[identifier] for identifier in state.picked_rows(key, ids)]


def _comparison(runs: Sequence[Run]) -> None:
    result = compare_runs(runs)
    st.markdown("**Side by side**")
    tables.show(result.table, key="run_comparison")
    for note in result.notes:
        st.caption(note)
    if result.options.empty:
        st.caption("These runs have the same options.")
        return
    names = (Column.text("option", "Option"), *(Column.text(run.id, str(run.record["name"])) for run in runs))
    tables.show(Table(result.options, names, "Options in which the picked runs differ"), key="run_options")


def _rename(run: Run) -> None:
    with st.popover("Rename", icon=":material/edit:", key="rename_popover", **_only_own(run)):
        name = st.text_input("Name", run.record["name"], key=f"rename_{run.id}", max_chars=200)
        if st.button("Rename", key="rename", type="primary", disabled=run.recorded):
            with boundary():
                rename_run(run, name)
                st.rerun()


def _notes(run: Run) -> None:
    with st.popover("Notes", icon=":material/sticky_note_2:", key="notes_popover", **_only_own(run)), boundary():
        asked = "Purpose and outcome of this run."
        notes = st.text_area("Notes", notes_of(run), key=f"notes_{run.id}", height=160, max_chars=20_000, placeholder=asked)
        st.caption("Saved in the run's folder; shown in the sidebar of every page.")
        if st.button("Save", key="save_notes", type="primary", disabled=run.recorded):
            write_notes(run, notes)
            st.rerun()


def _only_own(*runs: Run) -> _Guard:
    recorded = any(run.recorded for run in runs)
    return {"disabled": recorded, "help": _RECORDED if recorded else None}


def _delete_button(runs: Sequence[Run]) -> None:
    label = "Delete" if len(runs) == 1 else f"Delete these {len(runs)} runs"
    if st.button(label, key="delete_run", icon=":material/delete:", **_only_own(*runs)):
        _confirm(runs)


@st.dialog("Delete for good?")
def _confirm(runs: Sequence[Run]) -> None:
    """List what is deleted; delete on a second click."""
    with boundary():
        for run in runs:
            check_deletable(run)
        for run in runs:
            exports = [path.name for path in (run.path / "exports").glob("*") if path.is_dir()]
            also = f", with its exported models ({', '.join(exports)})" if exports else ""
            st.markdown(f"**{run.record['name']}** · {size(run_bytes(run))}{also}  \n`{run.path}`")
        st.caption("Trials, measurements and notes are deleted permanently. Calibration statistics stay: runs share them.")
        if any(run.storage_url for run in runs):
            st.caption("A study in a database stays there.")
        if st.button("Delete", key="delete_confirm", type="primary", icon=":material/delete_forever:"):
            for run in runs:
                delete_run(run)
            state.choose(run=None)
            st.rerun()
    if st.button("Keep", key="delete_keep"):
        st.rerun()

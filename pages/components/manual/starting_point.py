"""Starting point and budget of a draft."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.runs import client
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.requests import CurvesRequest
from lowrank_core.studio.manual.starting_points import missing_rules, starts
from lowrank_core.studio.shared.trial_names import ratio_words
from pages.components import state
from pages.components.manual.draft_state import DraftState, history, note, say, take
from pages.components.request_controls import ask
from pages.components.widgets import pick

__all__ = ["budget_ratio", "show"]


def show(editor: DraftState) -> None:
    """Draw the choice of a starting point, and the file upload."""
    trials = read_trials(editor.run)
    result = starts(editor.recipe, trials, state.selection().trial)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        key = editor.key("start")
        pick("Start from", result, key=key, width=400, help="A trial of this run, or an allocation rule at the budget on the right.")
        st.button(
            "Start from it",
            key="hand_begin",
            icon=":material/start:",
            on_click=_begin,
            args=(editor, key, result),
            help="Replaces all rows and locks. Undo restores them.",
        )
        with st.popover("Import", icon=":material/upload:", key="hand_import"):
            _import(editor)
        _budget(editor)
    source = state.held(editor.key("source"), "")
    st.caption(f"Started from **{source}**." if source else "A draft from the address of this page.")
    _without_curves(editor)


def _begin(editor: DraftState, key: str, words: Mapping[int | str, str]) -> None:
    start: int | str | None = state.held(key, None)
    if isinstance(start, str):
        name, ratio = start, budget_ratio(editor)
        take(editor, lambda: editor.recipe.ruled(name, ratio), f"{ALLOCATORS[name].label} at {100 * ratio:g} % removed")
        return
    trial = next((trial for trial in read_trials(editor.run) if trial.number == start), None)
    if trial is not None:
        take(editor, lambda: editor.recipe.draft(trial), words.get(trial.number, "").removeprefix("Best: ").split(",")[0])


def _import(editor: DraftState) -> None:
    file = st.file_uploader(
        "An allocation file (JSON)",
        type="json",
        key=editor.key("file"),
        max_upload_size=20,
        help="As “Allocation (JSON)” writes it: ranks by layer, null where it stays dense, and `locked`; without `locked` all are.",
    )
    taken = editor.key("file_taken")
    if file is not None and state.held(taken, "") != file.file_id:
        state.keep(taken, str(file.file_id))
        take(editor, lambda: editor.recipe.from_file(file.getvalue(), file.name), file.name)
        draft = history(editor).present
        if not note(editor) and len(draft.locked) == len(draft.ranks):
            say(editor, "", hint="The file locks every row, as one without `locked` does. Unlock the rows that may move.")
        st.rerun()


def _budget(editor: DraftState) -> None:
    """Draw the target ratio of the draft."""
    st.number_input(
        "Budget, % removed",
        1.0,
        99.0,
        100 * editor.search.compression_ratio,
        1.0,
        format="%.1f",
        key=editor.key("ratio"),
        persist_state="session",
        width=190,
        help=f"Of the parameters of the compressible linears. The run's own: {ratio_words(editor.search)}.",
    )


def budget_ratio(editor: DraftState) -> float:
    """Return the fraction of the linears' parameters to remove."""
    return state.held(editor.key("ratio"), 100 * editor.search.compression_ratio) / 100


def _without_curves(editor: DraftState) -> None:
    """Show what needs error curves, and how to get them."""
    if editor.recipe.record is not None:
        return
    missing = ", ".join(missing_rules(editor.recipe))
    with st.container(horizontal=True, vertical_alignment="center"):
        st.info(
            f"This run has no error curves: energy, predicted ΔKL and these rules are unavailable: {missing}. "
            + ("A search of your own records them." if editor.run.recorded else "Its worker writes them as it starts."),
            icon=":material/show_chart:",
        )
        if not editor.run.recorded and st.button("Compute error curves", key="hand_curves", disabled=_asked(editor)):
            ask(editor.run, [CurvesRequest()])


def _asked(editor: DraftState) -> bool:
    return any(request.get("kind") == "curves" for request in client.pending_requests(editor.run))

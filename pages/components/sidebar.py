"""Sidebar: the current run and its worker."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from lowrank_core.runs import Run, RunStatus, client
from lowrank_core.runs.manage import notes_of
from lowrank_core.studio.shared.formatting import plain, shortened
from lowrank_core.studio.shared.run_list import STATE_WORDS, all_runs, is_busy, is_working, run_labels, signature, status_words
from pages.components import state
from pages.components.boundary import boundary, live

__all__ = ["resume_button", "show"]

_PICKER = "run_picker"
_NOTES = 240  # characters of the notes; all of them are in the help
_TICK, _WARM_TICK = 1.0, 3.0  # seconds
_COLOURS = {
    "queued": "blue",
    "running": "blue",
    "stopping": "orange",
    "interrupted": "orange",
    "failed": "red",
    "stopped": "gray",
    "new": "gray",
}
_RESUMABLE = ("new", "stopped", "interrupted", "failed")


def show() -> None:
    """Draw the sidebar."""
    with st.sidebar, boundary():
        run = state.run()
        if run is None:
            st.caption("No runs yet. Start one on the Overview.")
            return
        labels = run_labels(all_runs())
        name = state.control(_PICKER, run.id)
        st.selectbox(
            "Run", list(labels), key=name, format_func=lambda key: labels.get(key, key), on_change=state.pick_from_widget("run", name)
        )
        st.caption(run.record["name"])
        if notes := notes_of(run):
            st.caption(f":material/sticky_note_2: {plain(shortened(notes, _NOTES))}", help=plain(notes))
        if run.recorded:
            st.badge("Recorded", icon=":material/inventory_2:", color="violet", help="Ships with the package; read-only.")
        else:
            _watch(run)


def _watch(run: Run) -> None:
    """Draw the worker's status; redraw the page once when a stage ends."""
    busy, warm, drawn = is_busy(run), run.status().active, signature(run)

    def status_panel() -> None:
        if signature(run) != drawn:
            st.rerun()
        _status(run, run.status())

    live(status_panel, _TICK if busy else _WARM_TICK if warm else None)


def _status(run: Run, status: RunStatus) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.badge(STATE_WORDS.get(status.state, status.state), color=_COLOURS.get(status.state, "green"))  # type: ignore[arg-type]
        st.caption(status.stage, width="content")
    if is_working(status):
        st.progress(status.fraction or 0.0, text=status_words(status) or "Working")
    if status.state == "failed":
        st.error(status.message or "The worker failed; its log says more.")
    elif status.message:
        st.caption(status.message)
    _buttons(run, status)


def _buttons(run: Run, status: RunStatus) -> None:
    if status.state in ("queued", "running") and st.button("Stop", key="stop_run", icon=":material/stop:", width="stretch"):
        client.request_stop(run)
        st.rerun()
    if status.state == "stopping" and st.button(
        "End now", key="end_run", help="Ends the process at once; the current step is discarded.", width="stretch"
    ):
        client.terminate(run)
        st.rerun()
    if status.state == "idle" and st.button(
        "Release memory", key="release_run", help="Ends the worker, which is idle and waits for requests.", type="tertiary"
    ):
        client.request_stop(run)
        st.rerun()
    if status.state in _RESUMABLE and not is_busy(run):
        resume_button(run, key="resume_run")


def resume_button(run: Run, *, key: str, width: Literal["stretch", "content"] = "stretch") -> None:
    """Draw a button that starts the worker again."""
    if st.button("Resume", key=key, icon=":material/play_arrow:", type="primary", width=width):
        client.start_worker(run)
        st.rerun()

"""Live part of the Rank search page."""

from __future__ import annotations

import time
from collections.abc import Sequence

import streamlit as st

from lowrank_core.config import OBJECTIVES, SearchConfig
from lowrank_core.errors import RunError
from lowrank_core.runs import Run, RunStatus
from lowrank_core.studies.gain import flat_words
from lowrank_core.studies.records import TrialRecord, best_trial, read_trials
from lowrank_core.studio.search.history import Progress, headline, progress
from lowrank_core.studio.search.pareto_chart import front_table
from lowrank_core.studio.search.timeline_chart import living_workers, worker_table
from lowrank_core.studio.shared.formatting import number, percent, short_duration
from lowrank_core.studio.shared.run_list import STATE_WORDS, is_working, status_words
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import ratio_words
from pages.components import state, tables
from pages.components.layout import metrics_row
from pages.components.search import trial_charts

__all__ = ["show", "show_importance"]


def show(run: Run) -> None:
    """Draw the current study of ``run``.

    Raises:
        RunError: a file of the run is damaged.
    """
    search = run.config.search
    if search is None:
        raise RunError("this run has no search.")
    trials, status = read_trials(run), run.status()
    now = progress(trials, search)
    _stage(run, status, now, flat_words(trials, search))
    if not trials:
        return
    chosen = _chosen(trials, search)
    if search.max_ratio is None:
        metrics_row(headline(now, search))
        trial_charts.history(run, trials, search, chosen)
        trial_charts.windows(trials, search, chosen)
    else:
        _front_figures(trials, now, search)
        trial_charts.front(trials, search, chosen)
    if chosen is not None and chosen.ranks:
        trial_charts.allocation(run, chosen, search)
    trial_charts.fingerprint(run, trials, search, chosen)
    trial_charts.table(run, trials, search)
    _workers(run, trials, chosen)


def show_importance(run: Run, search: SearchConfig) -> None:
    """Draw the importance of variables, apart from the trials, as it is slow and changes little.

    Raises:
        RunError: a file of the run is damaged.
    """
    trials = read_trials(run)
    if any(trial.params for trial in trials):
        trial_charts.importance(run, trials, search)


def _chosen(trials: Sequence[TrialRecord], search: SearchConfig) -> TrialRecord | None:
    """Return the selected trial, else the best; none over a range of ratios."""
    picked = next((trial for trial in trials if trial.number == state.selection().trial), None)
    return picked or (best_trial(trials) if search.max_ratio is None else None)


def _stage(run: Run, status: RunStatus, now: Progress, flat: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{now.complete} of {now.wanted} trials complete**", width="content")
        doing = f"{status.stage} · {status_words(status)}".strip(" ·") if is_working(status) else STATE_WORDS.get(status.state, "")
        st.caption("recorded" if run.recorded else doing, width="content")
    if flat:
        st.caption(flat)
    for warning in status.dense_warnings:
        st.warning(warning, icon=":material/warning:")
    st.caption(_counts(now, 0 if run.recorded else len(living_workers(run))) or " ")
    if not run.recorded and (is_working(status) or now.complete < now.wanted):
        st.progress(min(1.0, now.complete / now.wanted) if now.complete else status.fraction or 0.0)
    if status.state in ("stopped", "interrupted") and now.complete < now.wanted:
        st.caption("Resume in the sidebar: complete trials are kept.")


def _counts(now: Progress, workers: int) -> str:
    words = [
        f"{short_duration(now.seconds)} per trial (median)" if now.seconds is not None else "",
        *now.counts.parts,
        f"{workers} workers" if workers > 1 else "1 worker" if workers else "",
    ]
    return " · ".join(word for word in words if word)


def _front_figures(trials: Sequence[TrialRecord], now: Progress, search: SearchConfig) -> None:
    result = front_table(trials)
    minimum, maximum = (result.iloc[0], result.iloc[-1]) if len(result) else (None, None)
    metrics_row(
        {
            "Ratios": (ratio_words(search), "Every trial removes a fraction of its own within this range."),
            "On the front": (f"{len(result)} trials", "No other trial removes as much at a lower loss."),
            "Min removed": (
                f"{percent(minimum['removed'], 0)} at {number(minimum['value'], 3)}" if minimum is not None else "–",
                OBJECTIVES[search.objective],
            ),
            "Max removed": (
                f"{percent(maximum['removed'], 0)} at {number(maximum['value'], 3)}" if maximum is not None else "–",
                OBJECTIVES[search.objective],
            ),
        }
    )


def _workers(run: Run, trials: Sequence[TrialRecord], chosen: TrialRecord | None) -> None:
    """Draw workers and timeline if the panel is open: they grow with every trial."""
    panel = st.expander("Workers and timeline", key="workers_panel", icon=":material/group:", on_change="rerun")
    if not panel.open:
        return
    frame = worker_table(trials, {} if run.recorded else living_workers(run), time.time())
    columns = (
        Column.text("worker", "Worker", "Machine and process."),
        Column.whole("measured", "Trials measured"),
        Column.text("now", "Now", width="large"),
    )
    with panel:
        if not frame.empty:
            tables.show(Table(frame, columns, "Workers of this search"), key="worker_table")
        trial_charts.times(run, trials, chosen)

"""Charts and tables of a search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from lowrank_core.config import SearchConfig
from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.gain import search_gain
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studies.variables import read_ranges
from lowrank_core.studio.compare import comparison
from lowrank_core.studio.search import pareto_chart as fronts
from lowrank_core.studio.search.history import WORK, better_half, trials_spec
from lowrank_core.studio.search.history import history as history_of
from lowrank_core.studio.search.history_chart import history_chart
from lowrank_core.studio.search.parallel_coordinates_chart import fingerprint as fingerprint_of
from lowrank_core.studio.search.parallel_coordinates_chart import fingerprint_chart, importance_chart, importance_table, missing_words
from lowrank_core.studio.search.pareto_chart import front_chart
from lowrank_core.studio.search.static_chart import front_declared, history_declared
from lowrank_core.studio.search.timeline_chart import living_workers, timeline, timeline_chart
from lowrank_core.studio.search.trial_windows_chart import window_chart, window_losses
from lowrank_core.studio.shared.allocation_map import allocation_map, allocation_of
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.layer_map_chart import allocation_chart
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.trial_names import state_words, trial_label
from lowrank_core.studio.shared.vega import PICKED
from pages.components import charts, navigation, state, tables
from pages.components.loading import importances_of, pictures_of
from pages.components.widgets import offer

__all__ = ["allocation", "confirmed", "fingerprint", "front", "gain", "history", "importance", "table", "times", "windows"]

_GAIN = (
    "The sampled trial of lowest value against the rule of lowest value, on the same windows; 95 % intervals, paired bootstrap over "
    "windows. On validation text the trial was chosen, so its gain there is optimistic; no trial saw the test text."
)


def history(run: Run, trials: Sequence[TrialRecord], search: SearchConfig, chosen: TrialRecord | None) -> None:
    """Draw the objective of every trial."""
    view = history_of(trials, search.objective)
    near = st.toggle(
        "Only the better half",
        key="history_near",
        persist_state="session",
        help="Hides trials and baselines worse than the median, so that small gains are visible. The best baseline stays.",
    )
    shown = better_half(view) if near else view
    spec = history_declared(shown, history_chart(shown, chosen.number if chosen else None, pictures_of(run, trials, search)))
    hint = "Hover over a trial for a small map of its allocation, click it for a large one; drag to pan, Ctrl + wheel to zoom."
    if near:
        left_out = len(view.trials) - len(shown.trials) + len(view.baselines) - len(shown.baselines)
        spec = replace(spec, title="The better half of the trials on search-validation text")
        hint = f"{hint} **Left out**, as worse than half of the trials: {left_out} points and lines."
    charts.show(spec, key="history", hint=hint, on_pick=state.pick_from_vega("trial", "history", PICKED, "number"))


def windows(trials: Sequence[TrialRecord], search: SearchConfig, chosen: TrialRecord | None) -> None:
    """Draw the losses of the running (or chosen) trial by window; nothing without records."""
    view = window_losses(trials, chosen.number if chosen else None, search.objective)
    if view is None:
        return
    who = f"{view.shown}, running now" if view.running else view.shown
    charts.chart(
        window_chart(view),
        key="windows",
        title=f"{who}, window by window" if view.shown == view.other else f"{who}, against {view.other} window by window",
        how=f"dots are {view.shown}, green bars {view.other}; a dot below its bar is better there. On the {view.measured} windows that "
        f"both have seen: {number(view.shown_mean, 4)} against {number(view.other_mean, 4)}.",
        alt=f"Loss of {view.shown} on each search-validation window, next to {view.other}",
        data=view.frame,
    )


def front(trials: Sequence[TrialRecord], search: SearchConfig, chosen: TrialRecord | None) -> None:
    """Draw loss against compression ratio, and the Pareto front as a table."""
    view = fronts.front(trials, search.objective)
    spec = front_declared(view, front_chart(view, chosen.number if chosen else None))
    hint = "Click a point for its allocation."
    charts.show(spec, key="front", hint=hint, on_pick=state.pick_from_vega("trial", "front", PICKED, "number"))
    table = fronts.front_spec(trials, search)
    pick = state.pick_from_table("trial", "front_table", list(table.frame["trial"]))
    tables.show(table, key="front_table", height=230, on_pick=pick)


def allocation(run: Run, trial: TrialRecord, search: SearchConfig) -> None:
    """Draw the allocation of a trial, and offer it as a file."""
    facts = model_facts(run)
    if facts is None:
        return
    units = facts.units(search.compression)
    result = allocation_of(trial, units)
    if trial.state not in ("complete", "running"):
        st.caption(f"{trial_label(trial)}: {state_words(trial)}.")
    spec = allocation_chart(allocation_map(result, units), trial_label(trial), result.compression_ratio, state.selection().module)
    charts.show(spec, key="allocation_map", on_pick=state.pick_from_chart("module", "allocation_map"))
    with st.container(horizontal=True, vertical_alignment="center"):
        help = "Valid for `lowrank compress --ranks`, and on the page Manual allocation."
        offer("Allocation (JSON)", f"{run.id}-trial-{trial.number}.json", result.to_json(), key="download_allocation", help=help)
        st.page_link(navigation.COMPARE, label="Compare it on test text", icon=":material/balance:")


def fingerprint(run: Run, trials: Sequence[TrialRecord], search: SearchConfig, chosen: TrialRecord | None) -> None:
    """Draw the variables of each trial; nothing below two sampled points."""
    view = fingerprint_of(trials, search, read_ranges(run))
    if view is None:
        return
    rest = ""
    if view.trials < view.of_trials or view.variables < view.of_variables:
        rest = f" Shown: the best {view.trials} of {view.of_trials} trials, {view.variables} of {view.of_variables} variables."
    charts.chart(
        fingerprint_chart(view, chosen.number if chosen else None),
        key="fingerprint",
        title="Trial parameters, best at the left",
        how="a column is a trial, a row a variable; a row with one shade at the left and a mix at the right is a variable on which good "
        f"trials agree. Click a column for its allocation; drag to pan, Ctrl + wheel to zoom.{rest}",
        alt="Value of each variable in each trial, trials ordered by their objective",
        data=view.frame,
        on_pick=state.pick_from_vega("trial", "fingerprint", PICKED, "number"),
    )


def importance(run: Run, trials: Sequence[TrialRecord], search: SearchConfig) -> None:
    """Draw the importance of variables, or the number of trials it still needs."""
    result = importances_of(run, trials)
    if result.missing:
        st.caption(missing_words(result))
        return
    frame = importance_table(result, trials, search)
    charts.chart(
        importance_chart(frame),
        key="importance",
        title="Importance of variables",
        how=f"Shapley effect: share of the variance of {_importance_of(search)} over the whole search space that is due to a variable. A "
        f"Gaussian process fitted to {result.trials} trials estimates it. The lines are 90 % credible intervals; where they overlap, the "
        "order is open.",
        alt="Importance of each variable of the search, with intervals",
        data=frame,
    )


def _importance_of(search: SearchConfig) -> str:
    words = {"kl": "the KL divergence", "perplexity": "perplexity", "bolaco": "the objective"}[search.objective]
    return f"the logarithm of {words}" if search.models_logarithms else words


def times(run: Run, trials: Sequence[TrialRecord], chosen: TrialRecord | None) -> None:
    """Draw the timeline of workers and trials."""
    frame = timeline(trials, {} if run.recorded else living_workers(run), time.time())
    if frame.empty:
        return
    charts.chart(
        timeline_chart(frame, chosen.number if chosen else None),
        key="timeline",
        title="Timeline of workers and trials",
        how="a bar is a trial, its mark the outcome; gaps are time between trials. Click a mark for its allocation; drag to pan, Ctrl + "
        "wheel to zoom, double-click to reset.",
        alt="Trials as bars from start to end, a row for each worker",
        data=frame,
        on_pick=state.pick_from_vega("trial", "timeline", PICKED, "number"),
    )


def table(run: Run, trials: Sequence[TrialRecord], search: SearchConfig) -> None:
    """Draw the table of trials, and offer it as a file."""
    result = trials_spec(trials, search)
    st.markdown("**Trials**")
    pick = state.pick_from_table("trial", "trial_table", list(result.frame["trial"]))
    tables.show(replace(result, columns=[*result.columns, *WORK]), key="trial_table", height=300, on_pick=pick)
    offer("Trials (CSV)", f"{run.id}-trials.csv", result.frame, key="download_trials")


def gain(run: Run) -> None:
    """Say what the search added over its best rule, as far as it is; nothing before a trial is complete.

    Raises:
        RunError: an answer, or the journal, is damaged.
    """
    if any(trial.state == "complete" for trial in read_trials(run)):
        st.markdown(search_gain(run).words, help=_GAIN)


def confirmed(run: Run) -> None:
    """Draw the test results of the best trials; nothing without any.

    Raises:
        RunError: an answer, or the journal, is damaged.
    """
    result = comparison.confirmed(results(run), read_trials(run))
    if result is None:
        return
    st.subheader("Confirmed on test text", anchor=False)
    for warning in result.warnings:
        st.warning(warning, icon=":material/warning:")
    st.caption(
        f"No trial used this text: the search minimised on search-validation text. Protocol: {result.protocol}. Intervals are of 95 %, "
        "over windows."
    )
    tables.show(comparison.confirmed_spec(result), key="confirmed_table")
    st.page_link(navigation.COMPARE, label="More on the Compare page", icon=":material/balance:")

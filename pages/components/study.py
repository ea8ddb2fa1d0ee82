"""The live part of the Rank search page."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.config import SearchConfig
from lowrank_core.errors import RunError
from lowrank_core.figures.layermap import map_figure
from lowrank_core.figures.search import PICKED, history_chart
from lowrank_core.runs import Run, RunStatus
from lowrank_core.search.records import TrialRecord, best_trial, read_trials
from lowrank_core.views.formatting import duration, number, percent
from lowrank_core.views.model import model_facts
from lowrank_core.views.runs import STATE_WORDS, is_working, status_words
from lowrank_core.views.search import (
    OBJECTIVE_LABELS,
    allocation_map,
    allocation_of,
    history,
    progress,
    search_params,
    search_units,
    trial_label,
    trial_table,
)
from pages.components import navigation, state, tables
from pages.components.charts import chart
from pages.components.layout import figures_row

__all__ = ["show"]


def show(run: Run) -> None:
    """Draw the study of ``run`` as it is now.

    Raises:
        RunError: a file of the run is damaged.
    """
    search = run.config.search
    if search is None:
        raise RunError("this run has no search.")
    trials, status = read_trials(run), run.status()
    chosen = _chosen(trials)
    _stage(run, status, trials, search)
    if not trials:
        return
    _figures(trials, search)
    chart(
        history_chart(history(trials, search.objective), chosen.number if chosen else None),
        key="history",
        title="Every trial on search-validation text",
        how="lower is better; the green steps are the best so far, dashed lines the baselines. Click a point for its allocation; "
        "drag moves, Ctrl + wheel zooms, a double click resets.",
        alt="Objective of each trial in the order of asking, with baselines and the best so far",
        on_pick=state.pick_from_vega("trial", "history", PICKED, "number"),
    )
    if chosen is not None and chosen.ranks:
        _allocation(run, chosen, search)
    _table(run, trials, search)


def _chosen(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the trial that the user picked, else the best."""
    picked = next((trial for trial in trials if trial.number == state.selection().trial), None)
    return picked or best_trial(trials)


def _stage(run: Run, status: RunStatus, trials: Sequence[TrialRecord], search: SearchConfig) -> None:
    complete = sum(1 for trial in trials if trial.finished)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f"**{complete} of {search.trials} trials complete**", width="content")
        now = f"{status.stage} · {status_words(status)}".strip(" ·") if is_working(status) else STATE_WORDS.get(status.state, "")
        st.caption("recorded" if run.recorded else now, width="content")
    if not run.recorded and (is_working(status) or complete < search.trials):
        st.progress(min(1.0, complete / search.trials) if trials else status.fraction or 0.0)
    if status.state in ("stopped", "interrupted") and complete < search.trials:
        st.caption("Resume in the sidebar: complete trials are kept.")


def _figures(trials: Sequence[TrialRecord], search: SearchConfig) -> None:
    now = progress(trials, search)
    best = now.best
    figures_row(
        {
            "Best trial": (trial_label(best) if best else "–", "The least value so far."),
            "Best value": (number(best.value, 4) if best else "–", OBJECTIVE_LABELS[search.objective]),
            "Its perplexity": (
                number(best.perplexity) if best else "–",
                f"On search-validation text; uniform: {number(now.uniform_perplexity)}.",
            ),
            "Below uniform": (percent(now.gain), "How far the best value lies below that of the uniform baseline."),
            "Removed": (percent(best.compression_ratio) if best else "–", "Of the compressible linears' parameters, as counted."),
            "Time per trial": (duration(best.seconds) if best else "–", "Of the best trial."),
        }
    )


def _allocation(run: Run, trial: TrialRecord, search: SearchConfig) -> None:
    facts = model_facts(run)
    if facts is None:
        return
    units = search_units(facts.matrices, search.compression)
    allocation = allocation_of(trial, units)
    chart(
        map_figure(allocation_map(allocation, units), state.selection().module),
        key="allocation_map",
        title=f"Where {trial_label(trial)} keeps its parameters",
        how=f"bright cells keep most of their parameters, 100 % is dense; {percent(allocation.compression_ratio)} are removed in all.",
        alt=f"Kept fraction of parameters by block and module type for {trial_label(trial)}",
        on_pick=state.pick_from_chart("module", "allocation_map"),
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        name = f"{run.id}-trial-{trial.number}.json"
        st.download_button(
            "Allocation (JSON)",
            allocation.to_json(),
            name,
            "application/json",
            key="download_allocation",
            icon=":material/download:",
            help="Valid for `lowrank compress --ranks`.",
            on_click="ignore",
        )
        st.page_link(navigation.COMPARE, label="Compare it on test text", icon=":material/balance:")


def _table(run: Run, trials: Sequence[TrialRecord], search: SearchConfig) -> None:
    frame = trial_table(trials)
    columns = {
        "trial": tables.whole("Trial"),
        "state": tables.text("State"),
        "kind": tables.text("Kind"),
        "value": tables.figure("Value", "The objective."),
        "perplexity": tables.number("Perplexity", 2),
        "kl": tables.figure("KL (nats/token)"),
        "removed": tables.share("Removed"),
        "seconds": tables.number("Seconds", 1),
        **{
            name: tables.number(f"× {name}", 3, "Multiplier of this module type, before the projection onto the budget.")
            for name in search_params(trials)
        },
    }
    columns.pop(search.objective, None)  # it is the value
    st.markdown("**Trials**")
    pick = state.pick_from_table("trial", "trial_table", list(frame["trial"]))
    tables.table(frame, columns, key="trial_table", height=300, on_pick=pick, alt="Trials of the search")
    st.download_button(
        "Trials (CSV)",
        frame.to_csv(index=False),
        f"{run.id}-trials.csv",
        "text/csv",
        key="download_trials",
        icon=":material/download:",
        on_click="ignore",
    )

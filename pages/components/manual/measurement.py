"""Measurement of a draft in the run's study, and the accuracy of its prediction."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from lowrank_core.allocation import Draft
from lowrank_core.runs import client
from lowrank_core.runs.client import results
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studies.requests import MeasureRequest
from lowrank_core.studio.manual.expectation import expectation_help, expectation_words
from lowrank_core.studio.manual.expected_kl import estimate_words, measured_as, predicted_kl, trust
from lowrank_core.studio.manual.expected_kl_chart import prediction_figure
from lowrank_core.studio.manual.outcome import Picked, alongside, picked
from lowrank_core.studio.overview.text_facts import trial_windows
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import trial_label
from pages.components import navigation, state, tables
from pages.components.charts import chart
from pages.components.manual.draft_state import DraftState
from pages.components.request_controls import ask, why_not
from pages.components.sidebar import resume_button
from pages.components.widgets import pressed

__all__ = ["button", "expectation", "result", "status", "trusted"]


def button(editor: DraftState, draft: Draft) -> None:
    """Draw the button that measures the draft next."""
    now = _now(editor, draft, read_trials(editor.run))
    known = now.trial is not None and now.stage == "measured"
    help = "The run's worker measures it as its next trial, on search-validation text."
    reason = why_not(editor.run) or ("Measured: see below." if known else "Queued." if now.open else None)
    if pressed("Measure it now", key="measure_hand", type="primary", icon=":material/straighten:", why_not=reason, help=help):
        ask(editor.run, [MeasureRequest(dict(draft.ranks))])


def _now(editor: DraftState, draft: Draft, trials: Sequence[TrialRecord]) -> Picked:
    return picked(draft.ranks, trials, client.pending_requests(editor.run), results(editor.run))


def expectation(editor: DraftState, draft: Draft) -> None:
    """Show the expected or measured KL of the draft.

    Raises:
        RunError: the journal is damaged.
    """
    record = editor.recipe.record
    if record is not None and record.predicts:
        st.caption(
            expectation_words(record, editor.recipe.units, read_trials(editor.run), draft.ranks), help=expectation_help(_protocol(editor))
        )


def status(editor: DraftState, draft: Draft) -> None:
    """Show the state of the draft's measurement.

    Raises:
        RunError: an answer, or the journal, is damaged.
    """
    now = _now(editor, draft, read_trials(editor.run))
    others = {0: "", 1: " One other allocation is queued."}.get(now.others, f" {now.others} other allocations are queued.")
    if now.open:
        st.info(_open_words(now, editor) + others, icon=":material/hourglass_top:")
        if not editor.run.worker_alive():
            resume_button(editor.run, key="resume_measure", width="content")
    elif now.trial is not None and now.stage == "measured":
        st.caption(f":material/check: Measured as {trial_label(now.trial)}: KL {number(now.trial.kl, 4)}. More below.{others}")
    elif now.stage == "failed":
        st.error(f"Measuring failed: {now.error or 'its worker ended'}.", icon=":material/error:")
    elif now.stage == "refused":
        st.error(f"The worker refused this draft: {now.error}", icon=":material/error:")
    else:
        st.caption((why_not(editor.run) or "This draft is not measured yet.") + others)


def result(editor: DraftState, draft: Draft) -> None:
    """Draw the measured draft next to the best trial and uniform.

    Raises:
        RunError: the journal is damaged.
    """
    trials = read_trials(editor.run)
    trial = measured_as(trials, draft.ranks)
    if trial is None or not trial.finished:
        return
    st.subheader("This draft, measured", anchor=False)
    _table(editor, trial, trials)
    st.caption(f"Measured {_protocol(editor)}, as every trial; never on test text.")
    words = f"Show {trial_label(trial)} on Rank search"
    st.page_link(navigation.SEARCH, label=words, icon=":material/query_stats:", query_params=state.link_to_trial(trial.number))


def _open_words(now: Picked, editor: DraftState) -> str:
    if now.stage == "asked":
        return "Waits for the worker, which checks between two trials."
    if now.stage == "waiting" or now.trial is None:
        return "Queued as the next trial."
    windows = trial_windows(editor.run)
    of = f" of {windows.count}" if windows else ""
    return f"Being measured as {trial_label(now.trial)}: {len(now.trial.windows)}{of} windows."


def _table(editor: DraftState, trial: TrialRecord, trials: Sequence[TrialRecord]) -> None:
    frame = alongside(trial, trials, editor.search, editor.recipe.record)
    columns = (
        Column.text("name", "Allocation", width="medium"),
        Column.number("kl", "Measured KL", help="To the dense model, nats per token."),
        Column.number("predicted", "Predicted KL", help="Before it was measured; a prediction."),
        Column.number("perplexity", "Perplexity", 3),
        Column.share("removed", "Removed"),
    )
    shown = [column for column in columns if column.name != "predicted" or frame["predicted"].notna().any()]
    tables.show(Table(frame, shown, "This draft next to the best trial and the uniform baseline"), key="hand_result")


def _protocol(editor: DraftState) -> str:
    windows = trial_windows(editor.run)
    if windows is None:
        return "on search-validation text"
    return f"on search-validation text: {editor.run.config.text.reference}, {windows.words}"


def trusted(editor: DraftState, draft: Draft, predictions: pd.DataFrame) -> None:
    """Draw predicted against measured KL of the run's trials, with the method."""
    record = editor.recipe.record
    if record is None:
        return
    st.subheader("Accuracy of the prediction", anchor=False)
    result = trust(predictions)
    left, right = st.columns([1.7, 1], gap="large") if record.predicts and result is not None else (None, st.container())
    with right:
        if result is not None and record.predicts:
            st.markdown(result.sentence())
        elif record.predicts:
            st.markdown("Fewer than three trials of this run are measured: too few to say.")
        st.caption(estimate_words(record))
        st.caption(f"Measured {_protocol(editor)}.")
    if left is None:
        return
    with left:
        chart(
            prediction_figure(predictions, now=predicted_kl(record, draft.ranks)),
            key="prediction",
            title="Predicted and measured KL of this run's trials",
            how="on the dashed line prediction and measurement are equal; above it the measured loss is larger. Points along any rising "
            "line are ranked correctly.",
            alt="Measured against predicted KL divergence of every trial, on log axes, with the diagonal",
            data=predictions,
        )

"""Sensitivity form, and the progress of its measurement."""

from __future__ import annotations

import streamlit as st

from lowrank_core.metrics import METRICS
from lowrank_core.metrics.stacks import Wrapper
from lowrank_core.parameters import STORAGES
from lowrank_core.runs import Run, client
from lowrank_core.sensitivity.config import MODULE, TYPE, SensitivityConfig
from lowrank_core.studies.requests import SensitivityRequest
from lowrank_core.studio.sensitivity.sensitivity_plan import SensitivityPlan, last_answer, plan_of, usual_compression, waiting_request
from lowrank_core.studio.shared.formatting import count, duration, kind_label
from lowrank_core.studio.shared.model_facts import ModelFacts
from lowrank_core.studio.shared.run_list import is_working, status_words
from lowrank_core.wording import given_percent
from pages.components.boundary import boundary
from pages.components.request_controls import ask, why_not
from pages.components.sidebar import resume_button
from pages.components.widgets import draw, pressed

__all__ = ["form", "progress"]

_RATIOS = {ratio: given_percent(ratio) for ratio in (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9)}
_SCOPES = {TYPE: "All of a type together", MODULE: "Each module alone"}
_STAGE = "Measuring sensitivity"
_RECORDED = "A recorded run has no worker: start a calibration or a search of your own to measure."


def form(run: Run, facts: ModelFacts) -> None:
    """Draw the settings, their cost, and the button.

    Raises:
        RunError: a record is damaged.
    """
    st.caption(
        "One module is compressed, everything else stays dense, and the KL divergence to the dense model is measured on search-validation "
        "text. The middle ratio comes first, so that the picture is useful early. Trials and other requests take precedence."
    )
    config: SensitivityConfig | None = None
    plan: SensitivityPlan | None = None
    with boundary():
        config = _inputs(run, facts)
        plan = plan_of(run, facts.matrices, config)
    reason = why_not(run, _RECORDED)
    if reason is None and waiting_request(run) is not None:
        reason = "A measurement is already queued or running."
    if reason is None and (plan is None or plan.missing == 0):
        reason = "See the message above." if plan is None else "All cells are measured: see below."
    with st.container(horizontal=True, vertical_alignment="center"):
        start = pressed("Measure", key="start_sensitivity", type="primary", icon=":material/play_arrow:", why_not=reason)
        if plan is not None:
            st.caption(_plan_words(plan), width="content")
    if start and config is not None:
        ask(run, [SensitivityRequest(config)])


def _inputs(run: Run, facts: ModelFacts) -> SensitivityConfig:
    """Draw the inputs and return the config.

    Raises:
        ConfigError: they ask for nothing.
    """
    usual, maximum = usual_compression(run), run.config.text.validation_windows
    singles = {name: metric.label for name, metric in METRICS.items() if not isinstance(metric, Wrapper)}
    kinds = {matrix.kind: kind_label(matrix.kind) for matrix in facts.matrices}
    kept = draw(SensitivityConfig, "kept", key="sensitivity_ratios", choices=_RATIOS)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        scopes = draw(SensitivityConfig, "scopes", key="sensitivity_scopes", choices=_SCOPES)
        key = f"sensitivity_windows_{maximum}"
        windows = draw(SensitivityConfig, "windows", key=key, usual=maximum, max_value=maximum, width=140)
    with st.expander("Advanced"):
        first, second, third = st.columns([1.3, 1, 1.7])
        key = f"sensitivity_basis_{usual.basis}"
        basis = draw(SensitivityConfig, "basis", key=key, place=first, choices=singles, usual=usual.basis)
        key, stored = f"sensitivity_storage_{usual.storage}", {name: name.capitalize() for name in STORAGES}
        storage = draw(SensitivityConfig, "storage", key=key, place=second, choices=stored, usual=usual.storage)
        chosen = draw(SensitivityConfig, "kinds", key="sensitivity_kinds", place=third, choices=kinds)
    return SensitivityConfig(kept, scopes, chosen, windows, basis, storage)


def _plan_words(plan: SensitivityPlan) -> str:
    left = (
        f"**{count(plan.missing)}** of {count(plan.cells)} cells are left"
        if plan.missing < plan.cells
        else f"**{count(plan.cells)}** cells"
    )
    words = f"{left}, each on {count(plan.windows)} windows ({count(plan.tokens)} tokens)."
    if plan.seconds is not None and plan.missing:
        words += f" Estimate: about **{duration(plan.seconds)}**, going by {plan.source}."
    if plan.skipped:
        words += f" {count(plan.skipped)} matrices are left out: no rank makes them smaller."
    return words


def progress(run: Run) -> None:
    """Show the queued or running measurement with a stop button; else the error of the last one.

    Raises:
        RunError: a request or an answer is damaged.
    """
    request = waiting_request(run)
    if request is None:
        _ended(run)
        return
    status = run.status()
    with st.container(horizontal=True, vertical_alignment="center"):
        if not run.worker_alive():
            st.warning("A measurement is queued, but no worker is running.", icon=":material/pause:")
            resume_button(run, key="resume_sensitivity", width="content")
        elif status.stage == _STAGE:
            st.progress(status.fraction or 0.0, text=f"{_STAGE} · {status_words(status) if is_working(status) else ''}", width=560)
        else:
            doing = f"{status.stage} {status_words(status)}".strip() or "Starting"
            st.info(f"The measurement is queued. Now: {doing}.", icon=":material/hourglass_top:")
        if st.button("Stop measuring", key="stop_sensitivity", icon=":material/stop:", help="Finished cells are kept."):
            client.cancel(run, str(request["id"]))
            st.rerun()


def _ended(run: Run) -> None:
    answer = last_answer(run)
    if answer is not None and not answer.get("ok"):
        st.error(f"The last measurement ended: {answer.get('error')} Finished cells are kept.", icon=":material/error:")

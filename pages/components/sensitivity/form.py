"""Sensitivity form, and the progress of its measurement."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config import to_mapping
from lowrank_core.metrics import METRICS
from lowrank_core.metrics.stacks import Wrapper
from lowrank_core.parameters import STORAGES
from lowrank_core.runs import Run, client
from lowrank_core.sensitivity.config import MODULE, TYPE, SensitivityConfig
from lowrank_core.studio.sensitivity.sensitivity_plan import SensitivityPlan, last_answer, plan_of, usual_compression, waiting_request
from lowrank_core.studio.shared.formatting import count, duration, kind_label
from lowrank_core.studio.shared.model_facts import ModelFacts
from lowrank_core.studio.shared.run_list import is_working, status_words
from lowrank_core.wording import given_percent
from pages.components.boundary import boundary
from pages.components.sidebar import resume_button

__all__ = ["form", "progress"]

_RATIOS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9)
_SCOPES = {TYPE: "All of a type together", MODULE: "Each module alone"}
_STAGE = "Measuring sensitivity"
_RECORDED = "A recorded run has no worker: start a calibration or a search of your own to measure."
_USUAL = SensitivityConfig()


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
    waiting = waiting_request(run) is not None
    why_not = _RECORDED if run.recorded else "A measurement is already queued or running." if waiting else None
    done = plan is not None and plan.missing == 0
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button(
            "Measure",
            key="start_sensitivity",
            type="primary",
            icon=":material/play_arrow:",
            disabled=why_not is not None or plan is None or done,
            help=why_not or ("All cells are measured: see below." if done else None),
        )
        if plan is not None:
            st.caption(_plan_words(plan), width="content")
    if pressed and config is not None:
        with boundary():
            client.submit(run, "sensitivity", launch=True, **to_mapping(config))
            st.rerun()


def _inputs(run: Run, facts: ModelFacts) -> SensitivityConfig:
    """Draw the inputs and return the config.

    Raises:
        ConfigError: they ask for nothing.
    """
    kept = st.pills(
        "Kept of the parameters",
        _RATIOS,
        selection_mode="multi",
        default=list(_USUAL.kept),
        key="sensitivity_ratios",
        format_func=given_percent,
        help="Of what is compressed, biases and index tables counted.",
        persist_state="session",
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        scopes = st.pills(
            "Compressed",
            list(_SCOPES),
            selection_mode="multi",
            default=list(_SCOPES),
            key="sensitivity_scopes",
            format_func=_SCOPES.__getitem__,
            persist_state="session",
        )
        maximum = run.config.text.validation_windows
        windows = st.number_input(
            "Windows",
            1,
            maximum,
            maximum,
            key=f"sensitivity_windows_{maximum}",
            width=140,
            help=f"Of the {maximum} search-validation windows, evenly spaced. Fewer are faster, and noisier.",
            persist_state="session",
        )
    basis, storage, kinds = _advanced(run, facts)
    ratios, chosen = tuple(float(ratio) for ratio in kept), tuple(str(scope) for scope in scopes)
    return SensitivityConfig(ratios, chosen, kinds, int(windows), basis, storage)


def _advanced(run: Run, facts: ModelFacts) -> tuple[str, str, tuple[str, ...]]:
    usual = usual_compression(run)
    with st.expander("Advanced"):
        first, second, third = st.columns([1.3, 1, 1.7])
        singles = [name for name, basis in METRICS.items() if not isinstance(basis, Wrapper)]
        basis = first.selectbox(
            "Basis",
            singles,
            singles.index(usual.basis) if usual.basis in singles else 0,
            key=f"sensitivity_basis_{usual.basis}",
            format_func=lambda name: METRICS[name].label,
            help="How each matrix is factorised. That of the run's search, one matrix at a time, unless you choose another.",
            persist_state="session",
        )
        storage = second.selectbox(
            "Storage",
            list(STORAGES),
            list(STORAGES).index(usual.storage),
            key=f"sensitivity_storage_{usual.storage}",
            format_func=str.capitalize,
            help="Sets the rank at a kept ratio: pivoted factors need fewer parameters.",
            persist_state="session",
        )
        kinds = third.multiselect(
            "Types",
            list(dict.fromkeys(matrix.kind for matrix in facts.matrices)),
            key="sensitivity_kinds",
            format_func=kind_label,
            placeholder="All",
            persist_state="session",
        )
    return basis, storage, tuple(kinds)


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

"""Second text on the Compare page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from lowrank_core.runs import Run, client
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import CompareRequest, ModelRequest, OtherTextRequest
from lowrank_core.studio.compare.comparison import Comparison, warnings_of
from lowrank_core.studio.compare.comparison_chart import ratio_chart
from lowrank_core.studio.compare.second_text import other_text, other_text_spec
from lowrank_core.studio.overview.source_checks import TEXTS, check_text
from lowrank_core.studio.shared.model_refs import unmeasured
from pages.components import charts, tables
from pages.components.boundary import boundary
from pages.components.pickers import own_file
from pages.components.request_controls import ask, why_not
from pages.components.widgets import pick, pressed

__all__ = ["say", "show"]


def say(own: Sequence[Comparison], others: Mapping[str, Sequence[Comparison]]) -> None:
    """Summarise the newest second text in a line; nothing without one."""
    view = other_text(own, next(iter(others.values()), ()))
    if view is not None:
        st.caption(f":material/compare_arrows: Second text. {view.words}")


def show(
    run: Run,
    chosen: Sequence[ModelKey],
    trials: Sequence[TrialRecord],
    own: Sequence[Comparison],
    others: Mapping[str, Sequence[Comparison]],
) -> None:
    """Draw the form for a second text, and the results."""
    _form(run, chosen, trials, own, others)
    if not others:
        st.caption("The calibration text decides what is kept; other kinds of text can lose far more. Measure a second text to check.")
        return
    reference = st.selectbox("Shown", list(others), key="second_text_shown") if len(others) > 1 else next(iter(others))
    view = other_text(own, others[reference])
    if view is None:
        return
    for warning in warnings_of(others[reference]):
        st.warning(warning, icon=":material/warning:")
    st.markdown(view.words)
    charts.show(ratio_chart(view), key="second_text_ratios")
    tables.show(other_text_spec(view), key="second_text_table")
    st.caption(f"Protocols: {view.own_protocol or 'not measured'}; {view.other_protocol}.")


def _form(
    run: Run,
    chosen: Sequence[ModelKey],
    trials: Sequence[TrialRecord],
    own: Sequence[Comparison],
    others: Mapping[str, Sequence[Comparison]],
) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        text = pick("Second text", dict(reversed(TEXTS.items())), key="second_text", persist_state="session", width=260)
        about = "UTF-8 .txt, .jsonl or .parquet with a `text` column; its last fifth is measured."
        path = own_file("second_text_path", about, width=320) if text == "file" else ""
        measure = pressed(
            "Measure the chosen models on it",
            key="measure_second",
            icon=":material/compare_arrows:",
            why_not=why_not(run) or (None if chosen else "Choose a model above."),
            help="Next to the dense model, on the same windows; also on the run's own text if that is missing.",
        )
    if not measure:
        return
    with boundary():
        reference = check_text(f"file:{path.strip()}" if text == "file" else text)
        pending = client.pending_requests(run)
        missing = unmeasured(chosen, trials, own, [request for request in pending if request.get("kind") == "compare"])
        wanted = unmeasured(chosen, trials, others.get(reference, ()))
        requests: list[ModelRequest] = [*map(CompareRequest, missing), *(OtherTextRequest(key, reference) for key in wanted)]
        if requests:
            requests.sort(key=lambda request: chosen.index(request.trial))  # those of one model in a row: it is built once
            ask(run, requests)
        st.info("All chosen models are measured on this text.", icon=":material/check:")

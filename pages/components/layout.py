"""Common parts of pages: header, empty states, notices."""

from __future__ import annotations

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.overview.text_facts import text_facts
from lowrank_core.studio.shared.formatting import count
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.run_list import is_working, status_words
from lowrank_core.studio.shared.table import Metrics
from lowrank_core.studio.shared.trial_names import ratio_words
from pages.components import navigation, state
from pages.components.boundary import live
from pages.components.loading import spectra_of, weight_spectra_of

__all__ = ["analysed_run", "calibrated_run", "empty", "metrics_row", "header", "needs_calibration", "page_run"]

_TICK = 2.0  # seconds


def header(title: str, question: str) -> None:
    """Write title and subtitle of a page, then notes on a bad link."""
    if not state.framed():
        # Until st.navigation is first called, Streamlit runs a page that is opened by its address without app.py, as it
        # finds a folder `pages`. The call ends that for the whole server; the next run goes through the frame.
        st.navigation(navigation.pages())
        st.rerun()
    st.title(title, anchor=False)
    st.caption(question)
    for note in state.notes():
        st.info(note, icon=":material/link_off:")


def page_run() -> Run | None:
    """Write model, text and protocol of the current run and return it; None without any run."""
    run = state.run()
    if run is None:
        return None
    config = run.config
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if run.recorded:
            st.badge("Recorded run, shipped with the package", icon=":material/inventory_2:", color="violet")
        text = text_facts(run)
        calibration = next((split for split in text.splits if split.name == "calibration"), None) if text else None
        facts = [f"model **{config.model.reference}**", f"text **{config.text.reference}**", f"context {config.text.context}"]
        facts += [f"{count(calibration.tokens)} calibration tokens"] if calibration else []
        facts += [f"{ratio_words(config.search)} removed by the search"] if config.search else []
        st.caption(" · ".join(facts), width="content")
    return run


def calibrated_run() -> tuple[Run, tuple[LayerSpectrum, ...]]:
    """Return the current run and its spectra; without spectra, say what to do and stop the page."""
    run = page_run()
    spectra = spectra_of(run) if run is not None else None
    if run is None or spectra is None:
        needs_calibration(run)
        st.stop()
    return run, spectra


def analysed_run() -> tuple[Run, tuple[LayerSpectrum, ...]]:
    """Return the current run and its spectra, before its calibration those of the weights so far; without any, stop the page."""
    run = state.run()
    spectra = () if run is None or spectra_of(run) is not None else weight_spectra_of(run)
    if run is None or not spectra:
        return calibrated_run()
    page_run()
    _follow(run, spectra)
    return run, spectra


def _follow(run: Run, spectra: tuple[LayerSpectrum, ...]) -> None:
    """Say what is shown before a calibration, and redraw the page when further blocks are done."""
    facts, status = model_facts(run), run.status()
    total = len(facts.matrices) if facts is not None else len(spectra)

    def further() -> None:
        if len(weight_spectra_of(run)) > len(spectra):
            st.rerun()
        now = run.status()
        doing = f" **{now.stage}** {status_words(now)}" if is_working(now) else ""
        words = "Spectra of features follow when the calibration is done."
        st.info(f"Weights alone: {len(spectra)} of {total} matrices. {words}{doing}", icon=":material/hourglass_top:")

    live(further, _TICK if is_working(status) else None)


def empty(title: str, text: str, *, icon: str, page: str, label: str) -> None:
    """Show an empty state with the next step and a link."""
    with st.container(border=True, horizontal_alignment="center"):
        st.space("small")
        st.markdown(f"### {icon} {title}", text_alignment="center", anchors=False)
        st.markdown(text, text_alignment="center")
        st.page_link(page, label=label, icon=":material/arrow_forward:")
        st.space("small")


def needs_calibration(run: Run | None) -> None:
    """Show why there are no spectra, and the next step."""
    if run is None:
        text = "Choose a model and a text on the Overview and start a calibration. On the bundled model it takes under a minute."
        empty("Nothing measured yet", text, icon=":material/grid_view:", page=navigation.OVERVIEW, label="Start a calibration")
        return
    status = run.status()
    if is_working(status):
        with st.container(border=True):
            st.markdown(f"**{status.stage or 'Starting'}** {status_words(status)}")
            st.caption("This page fills in by itself when the calibration is done.")
        return
    message = f"This run ended before its calibration was done. {status.message}".strip()
    empty("No spectra in this run", message, icon=":material/warning:", page=navigation.OVERVIEW, label="Start another calibration")


def metrics_row(metrics: Metrics) -> None:
    """Write metrics side by side."""
    with st.container(horizontal=True, gap="small"):
        for label, (value, meaning) in metrics.items():
            st.metric(label, value, help=meaning or None, border=True, width="stretch")

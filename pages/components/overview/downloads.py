"""Downloads of a run, and the commands that reproduce it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import streamlit as st

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.errors import LowRankError
from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare.comparison import comparisons
from lowrank_core.studio.compare.healing_runs import healings
from lowrank_core.studio.export.export_plan import Source
from lowrank_core.studio.overview.calibration_quality import calibration_facts
from lowrank_core.studio.overview.text_facts import text_facts
from lowrank_core.studio.report import charts_html, report_html
from lowrank_core.studio.search.history import trials_spec
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.reproduce import reproduction
from lowrank_core.studio.shared.spreadsheet import csv_of
from lowrank_core.studio.shared.summary import comparisons_table
from pages.components.loading import spectra_of
from pages.components.widgets import offer

__all__ = ["show"]


def show(run: Run, source: Source | None) -> None:
    """Draw the downloads; ``source`` is the chosen model.

    Raises:
        LowRankError: a file of the run is damaged.
    """
    damage = _damage(run)
    if damage:
        st.error(f"The report and the charts can't be written: {damage}", icon=":material/error:")
    why_not = "A file of this run is damaged." if damage else ""
    about = "One file, no server: charts, tables, protocol, seeds."
    _offer("Report (HTML)", "report.html", partial(report_html, run), about, why_not)
    pictures = "All charts in one self-contained file; each has buttons for SVG, PNG, CSV and interactive HTML."
    _offer("Charts (SVG, PNG, HTML)", "charts.html", partial(charts_html, run), pictures, why_not)
    _tables(run, source)
    st.caption(
        "On each page, the camera above a chart saves it as SVG, and the button next to it saves its data as CSV. Rendered in your "
        "browser; nothing is uploaded. Model cards are with the written models."
    )
    _again(run)


def _damage(run: Run) -> str:
    """Return the error of a damaged run, checked before files are made on demand; empty if none."""
    readers: tuple[Callable[[Run], object], ...] = (model_facts, text_facts, calibration_facts, spectra_of, results, healings)
    try:
        for read in readers if run.config.search is None else (*readers, read_trials):
            read(run)
    except LowRankError as error:
        return str(error)
    return ""


def _tables(run: Run, source: Source | None) -> None:
    search = run.config.search
    if search is None:
        return
    trials = read_trials(run)
    result = comparisons(results(run), trials)
    why_not = "" if source is not None and source.ranks else "Its ranks are known once the worker has built or measured it."
    chosen = source.label if source is not None else "Nothing chosen"
    meaning = f"Ranks by layer of: {chosen}. For `lowrank compress --ranks`, or as the start of a manual allocation."
    name = source.name.replace(" ", "-") if source is not None else "allocation"
    _offer("Allocation (JSON)", f"{name}.json", partial(_allocation, run, source), meaning, why_not)
    rows, reason = "Every trial: state, value, perplexity, KL, ratio, seconds, variables.", "" if trials else "No trial yet."
    _offer("Trials (CSV)", "trials.csv", lambda: csv_of(trials_spec(trials, search).frame), rows, reason)
    rows = "Dense and everything measured on test text, with intervals, sizes and protocol."
    reason, table = "" if result else "Nothing was measured on test text yet.", comparisons_table(result)
    _offer("Comparison (CSV)", "comparison.csv", lambda: csv_of(table), rows, reason)


def _allocation(run: Run, source: Source | None) -> str:
    search, facts = run.config.search, model_facts(run)
    assert source is not None
    assert source.ranks is not None
    assert search is not None
    assert facts is not None
    units = facts.units(search.compression)
    return allocation_from_ranks(source.name, units, source.ranks).to_json()


def _again(run: Run) -> None:
    """Offer the run's record, and show the commands that reproduce it."""
    result = reproduction(run.record, run.config)
    with st.expander("Repeat the whole run", icon=":material/replay:", key="again_panel"):
        _offer("run.json", "run.json", lambda: result.record, "All options of the run. Save the file, then:")
        st.code(result.exact, language="bash", wrap_lines=True)
        st.caption("As command-line flags")
        st.code(result.options, language="bash", wrap_lines=True)


def _offer(label: str, file: str, made: Callable[[], str], meaning: str, why_not: str = "") -> None:
    """Draw an on-demand download with its description."""
    left, right = st.columns([1, 2.6], vertical_alignment="center")
    key = f"download_{label}"
    offer(label, file, lambda: made().encode("utf-8"), key=key, place=left, disabled=bool(why_not), width="stretch")
    right.caption(f"{meaning} {why_not}".strip())

"""Rank search: rank allocations under a parameter budget."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config import RunConfig
from lowrank_core.studio.overview.source_checks import check_model
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.run_list import is_busy
from pages.components import coverage, layout, navigation
from pages.components.boundary import boundary, live
from pages.components.search import search_controls, trial_charts, trials
from pages.components.search.form import search_form

IMPORTANCE_TICK = 5.0  # seconds

layout.header("Rank search", "Search rank allocations under a parameter budget.")

with boundary():
    run = layout.page_run()
    config = run.config if run is not None else RunConfig()
    searched = run is not None and config.search is not None
    facts = (model_facts(run) if run is not None else None) or check_model(config.model.reference)
    # By run: once a search was started, its trials are on screen and not the form.
    with st.expander("Start a new search", expanded=not searched, icon=":material/tune:", key=f"new_search_{run.id if run else ''}"):
        kept = (
            "the settings of its calibration, which is done again on this machine"
            if run is not None and run.recorded
            else "its calibration"
        )
        st.caption(f"Model **{config.model.reference}**, text **{config.text.reference}**: taken from the run on screen, with {kept}.")
        search_form(config, facts)

    if run is not None and config.search is not None:
        search_controls.show(run, config.search, facts)
        coverage.show(facts, config.search.compression_ratio)
        # The live part draws itself again every second while a worker is at it, and only then.
        busy = is_busy(run)
        live(trials.show, 1.0 if busy else None, run)
        live(trials.show_importance, IMPORTANCE_TICK if busy else None, run, config.search)
        trial_charts.confirmed(run)
        trial_charts.gain(run)
        st.page_link(navigation.MANUAL, label="Choose ranks manually, and have them measured in this search", icon=":material/tune:")
    elif run is not None:
        st.info(
            "The run on screen measured spectra only. Start a search above: it takes over the calibration, so trials begin at once.",
            icon=":material/info:",
        )
    else:
        st.info("No run yet. Start a search above: it calibrates the bundled model first, then trials stream in.", icon=":material/info:")

"""Overview: model, text, calibration and runs."""

from __future__ import annotations

import streamlit as st

from lowrank_core.studio.overview.calibration_quality import calibration_facts
from lowrank_core.studio.overview.text_facts import text_facts
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.run_list import all_runs
from pages.components import layout
from pages.components.boundary import boundary
from pages.components.overview import facts, runs_section
from pages.components.overview.calibration_form import calibration_form

layout.header("Overview", "Model, text, and quality of the calibration.")

with boundary():
    run = layout.page_run()
    if run is None:
        st.markdown(
            "Find the low-rank layers of a causal language model, search rank allocations under a parameter budget, and compare the "
            "results. Start with the bundled model: nothing to download."
        )
    with st.expander(
        "Calibrate a model",
        expanded=run is None or run.recorded,
        icon=":material/play_circle:",
        key=f"calibrate_{run.id if run is not None else ''}",  # by run: once one was started, it is on screen and not the form
    ):
        calibration_form()
    if run is not None:
        facts.failure(run)
        model, text, calibration = model_facts(run), text_facts(run), calibration_facts(run)
        if model is not None:
            facts.model_section(model, run.config.model.reference)
        if text is not None:
            facts.text_section(text)
        if calibration is not None:
            facts.calibration_section(run, calibration)
        facts.next_steps(run)
    runs_section.show(all_runs(), run)

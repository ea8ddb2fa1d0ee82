"""Sensitivity: KL divergence when a single module is compressed."""

from __future__ import annotations

import streamlit as st

from lowrank_core.sensitivity.records import read_records
from lowrank_core.studio.shared.model_facts import model_facts
from pages.components import layout
from pages.components.boundary import boundary
from pages.components.loading import spectra_of
from pages.components.sensitivity import form, results

layout.header("Sensitivity", "KL divergence when a single module is compressed.")

with boundary():
    run = layout.page_run()
    spectra = spectra_of(run) if run is not None else None
    facts = model_facts(run) if run is not None else None
    if run is None or spectra is None or facts is None:
        layout.needs_calibration(run)
        st.stop()

    with boundary():
        measured = bool(read_records(run))
        with st.expander("Measure", expanded=not measured, icon=":material/straighten:", key=f"measure_sensitivity_{measured}"):
            form.form(run, facts)
    results.watch(run, facts, spectra)

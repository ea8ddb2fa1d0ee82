"""Feature energy: energy retained by rank."""

from __future__ import annotations

import streamlit as st

from lowrank_core.studio.energy.energy_table import energy_at_rank
from lowrank_core.studio.overview.calibration_quality import calibration_facts
from lowrank_core.studio.shared.protocol import spectra_protocol
from lowrank_core.studio.spectra.spectrum_table import spectrum_named
from pages.components import layout, pickers
from pages.components.boundary import boundary
from pages.components.energy import sections
from pages.components.overview import calibration_quality

layout.header("Feature energy", "Energy of features and weights retained at a rank.")

with boundary():
    run, spectra = layout.calibrated_run()

    left, right = st.columns(2, gap="large")
    with left:
        module = pickers.module_picker([spectrum.shape for spectrum in spectra])
    spectrum = spectrum_named(spectra, module)
    full = spectrum.shape.max_rank
    rank = right.slider("Rank", 1, full, max(1, spectrum.shape.break_even_rank // 2), key=f"rank_{full}", persist_state="session")
    st.markdown(energy_at_rank(spectrum, rank).sentence())
    sections.curves(spectra, spectrum, rank)
    st.caption(spectra_protocol(run))
    with boundary():
        sections.loss(run, spectrum, rank)

    st.subheader("Pooled against sample covariance", anchor=False)
    calibration = calibration_facts(run)
    sections.pooling(spectrum, calibration.input_of(module) if calibration else None)
    if calibration is not None:
        calibration_quality.show(run, spectra, calibration, module)

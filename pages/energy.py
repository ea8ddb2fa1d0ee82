"""Feature energy: how much does a rank keep?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.views.calibration import calibration_facts
from lowrank_core.views.energy import energy_at_rank
from lowrank_core.views.protocol import spectra_protocol
from lowrank_core.views.spectrum import spectrum_named
from pages.components import energy_parts, layout, pickers, quality
from pages.components.boundary import boundary

layout.header("Feature energy", "How much of a module's output does a rank keep, and how much of its weight?")

with boundary():
    run, spectra = layout.calibrated_run()

    left, right = st.columns(2, gap="large")
    with left:
        module = pickers.module_picker([spectrum.shape.name for spectrum in spectra])
    spectrum = spectrum_named(spectra, module)
    full = spectrum.shape.max_rank
    rank = right.slider("Rank", 1, full, max(1, spectrum.shape.break_even_rank // 2), key=f"rank_{full}", persist_state="session")
    st.markdown(energy_at_rank(spectrum, rank).sentence())
    energy_parts.curves(spectra, spectrum, rank)
    st.caption(spectra_protocol(run))
    with boundary():
        energy_parts.loss(run, spectrum, rank)

    st.subheader("Pooled against sample covariance", anchor=False)
    calibration = calibration_facts(run)
    energy_parts.pooling(spectrum, calibration.input_of(module) if calibration else None)
    if calibration is not None:
        quality.show(run, spectra, calibration, module)

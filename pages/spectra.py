"""Spectra: singular values of weights, eigenvalues of features."""

from __future__ import annotations

import streamlit as st

from lowrank_core.studio.shared.module_choices import run_facts
from lowrank_core.studio.shared.protocol import spectra_protocol
from lowrank_core.studio.spectra.spectrum_table import spectrum_named
from pages.components import layout, pickers, state
from pages.components.boundary import boundary
from pages.components.spectra import directions, experts, layer_map, module_spectra

layout.header("Spectra", "Singular values of weights, eigenvalues of features.")

with boundary():
    run, spectra = layout.analysed_run()

    facts = run_facts(run, state.selection().trial)
    layer_map.show(spectra, facts, spectra_protocol(run) if spectra[0].calibrated else "")

    st.subheader("One module", anchor=False)
    module = pickers.module_picker([spectrum.shape for spectrum in spectra])
    module_spectra.show(spectrum_named(spectra, module), facts)
    if spectra[0].calibrated:
        experts.show(run, spectra, module, facts)
        directions.show(run, module)

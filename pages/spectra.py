"""Spectra: where is the model low-rank?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.figures.layermap import map_figure
from lowrank_core.figures.spectra import scree_figure
from lowrank_core.views.spectrum import METRICS, SOURCES, atlas, atlas_table, module_facts, scree_curves, spectrum_named
from pages.components import layout, pickers, state, tables
from pages.components.boundary import boundary
from pages.components.charts import chart
from pages.components.loading import spectra_of

layout.header("Spectra", "Where is the model low-rank: in its weights, or in its features?")

with boundary():
    run = layout.page_run()
    spectra = spectra_of(run) if run is not None else None
    if spectra is None:
        layout.needs_calibration(run)
        st.stop()

    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        metric = st.selectbox(
            "Metric", list(METRICS), key="metric", format_func=lambda name: METRICS[name].label, persist_state="session", width=230
        )
        source = st.segmented_control(
            "Of",
            list(SOURCES),
            key="metric_source",
            default="features",
            required=True,
            format_func=SOURCES.__getitem__,
            persist_state="session",
        )
        relative = st.toggle("As share of full rank", key="metric_relative", value=True, persist_state="session")

    names = [spectrum.shape.name for spectrum in spectra]
    module = state.module_of(names)
    view = atlas(spectra, metric, source, relative=relative)
    chart(
        map_figure(view, module),
        key="spectra_map",
        title=f"{METRICS[metric].label} of every module's {source}",
        how=f"{METRICS[metric].meaning}; dark cells are low-rank. Click a cell to look into that module.",
        alt=f"Map of {METRICS[metric].label.lower()} by block and module type",
        data=view.frame,
        on_pick=state.pick_from_chart("module", "spectra_map"),
    )
    with st.expander("The same as a table"):
        columns = {
            "module": tables.text("Module", width="medium"),
            "shape": tables.text("Shape (out × in)"),
            "features": tables.number("Features (ranks)", 1),
            "features_relative": tables.share("Features, of full rank"),
            "weights": tables.number("Weights (ranks)", 1),
            "weights_relative": tables.share("Weights, of full rank"),
            "break_even": tables.whole("Break-even rank"),
        }
        pick = state.pick_from_table("module", "spectra_table", names)
        tables.table(atlas_table(spectra, metric), columns, key="spectra_table", height=320, on_pick=pick, alt="Metric of every module")

    st.subheader("One module", anchor=False)
    module = pickers.module_picker(names)
    spectrum = spectrum_named(spectra, module)
    layout.figures_row(module_facts(spectrum))
    chart(
        scree_figure(scree_curves(spectrum)),
        key="scree",
        title=f"Spectra of {module}",
        how="the faster a curve falls, the fewer directions matter; left of the break-even rank two factors are smaller than the matrix.",
        alt=f"Singular values of the weight and square roots of feature eigenvalues of {module}, on log axes",
    )

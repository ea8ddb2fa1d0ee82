"""Feature energy: how much does a rank keep?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.figures.energy import groups_figure, left_figure, pooling_figure, retained_figure
from lowrank_core.views.calibration import calibration_facts, group_table
from lowrank_core.views.energy import energy_at_rank, energy_curves, pooling_curves
from lowrank_core.views.formatting import percent
from lowrank_core.views.spectrum import spectrum_named
from pages.components import layout, pickers
from pages.components.boundary import boundary
from pages.components.charts import chart
from pages.components.loading import spectra_of

layout.header("Feature energy", "How much of a module's output does a rank keep, and how much of its weight?")

with boundary():
    run = layout.page_run()
    spectra = spectra_of(run) if run is not None else None
    if run is None or spectra is None:
        layout.needs_calibration(run)
        st.stop()

    left, right = st.columns(2, gap="large")
    with left:
        module = pickers.module_picker([spectrum.shape.name for spectrum in spectra])
    spectrum = spectrum_named(spectra, module)
    full = spectrum.shape.max_rank
    rank = right.slider("Rank", 1, full, max(1, spectrum.shape.break_even_rank // 2), key=f"rank_{full}", persist_state="session")
    st.markdown(energy_at_rank(spectrum, rank).sentence())

    curves = energy_curves(spectrum)
    left, right = st.columns(2, gap="large")
    with left:
        chart(
            retained_figure(curves, rank),
            key="energy_kept",
            title="Energy kept",
            how="a curve that rises early is low-rank: features often are where weights are not.",
            alt=f"Cumulative energy of features and weights of {module} against rank",
        )
    with right:
        chart(
            left_figure(curves, rank),
            key="energy_removed",
            title="Energy removed",
            how="the share of energy that a rank loses; each step down is a power of ten.",
            alt=f"Energy removed from features and weights of {module} against rank, log scale",
        )

    st.subheader("Pooled against sample covariance", anchor=False)
    calibration = calibration_facts(run)
    entry = calibration.input_of(module) if calibration else None
    if entry is not None:
        st.caption(
            f"Input `{entry.input_group}`, {entry.width} wide, read by {len(entry.layers)} modules: "
            f"pooling moved its covariance by {percent(entry.pooled_to_sample, 2)} (relative Frobenius distance)."
        )
    left, right = st.columns(2, gap="large")
    with left:
        chart(
            pooling_figure(pooling_curves(spectrum)),
            key="pooling",
            title="Feature eigenvalues, pooled and sample",
            how="where the curves part, differences between groups of text made up part of the variance.",
            alt=f"Square roots of pooled and sample feature eigenvalues of {module}",
        )
    if entry is not None and len(entry.group_traces):
        with right:
            chart(
                groups_figure(group_table(entry)),
                key="groups",
                title="Variance of each group",
                how="long bars are pieces of text that excite this input more, or less, than the rest.",
                alt="Deviation of the trace of each group's covariance from the mean of groups",
            )

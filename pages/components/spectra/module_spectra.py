"""Spectra of the current module."""

from __future__ import annotations

import streamlit as st

from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.studio.spectra.density import density, density_table
from lowrank_core.studio.spectra.spectrum_chart import density_figure, scree_chart
from lowrank_core.studio.spectra.spectrum_table import module_facts, scree_curves
from pages.components import charts, layout

__all__ = ["show"]

_DENSITIES = {
    "weights": (
        "Eigenvalue density of the weights",
        "the dashed curve is the Marchenko-Pastur law of a random matrix with the same entry variance; eigenvalues right of its edge are "
        "signal.",
    ),
    "features": (
        "Eigenvalue density of the features",
        "a wide, flat shape is low-rank: few directions carry most of the variance.",
    ),
}


def show(spectrum: LayerSpectrum, facts: RunFacts) -> None:
    """Draw the metrics, the scree plot and both densities of a module."""
    choice = facts.choices.get(spectrum.shape.name)
    layout.metrics_row(module_facts(spectrum))
    if choice is not None:
        st.caption(f"{facts.trial}: {choice.words}.")
    charts.show(scree_chart(scree_curves(spectrum, facts)), key="scree")
    for column, source in zip(st.columns(2, gap="large"), _DENSITIES, strict=True):
        with column:
            _density(spectrum, source)


def _density(spectrum: LayerSpectrum, source: str) -> None:
    result = density(spectrum, source)
    title, how = _DENSITIES[source]
    if result is None:
        st.markdown(f"**{title}**")
        st.caption("All eigenvalues are zero." if spectrum.calibrated else "Known when the calibration is done.")
        return
    charts.chart(
        density_figure(result),
        key=f"density_{source}",
        title=title,
        how=how,
        alt=f"{title} of {spectrum.shape.name}, by decades",
        data=density_table(result),
    )
    st.caption(f"Tail: {result.tail or 'too few eigenvalues to fit a power law'}.")

"""Calibration-quality panel."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.overview.calibration_quality import (
    QUALITIES,
    CalibrationFacts,
    input_table,
    inputs_spec,
    quality_map,
    quality_metrics,
    quality_warnings,
)
from lowrank_core.studio.shared.layer_map_chart import map_figure
from pages.components import layout, state, tables
from pages.components.charts import chart
from pages.components.widgets import pick

__all__ = ["show"]


def show(run: Run, spectra: Sequence[LayerSpectrum], facts: CalibrationFacts, module: str) -> None:
    """Draw the metrics, the map and the table of all distinct inputs."""
    st.subheader("Calibration quality", anchor=False)
    for warning in quality_warnings(facts):
        st.warning(warning, icon=":material/warning:")
    search = run.config.search
    damping = search.compression.input_damping if search is not None else None
    inverted = "Added to every eigenvalue of an input's covariance before it is inverted, relative to their mean."
    unused = "Not used by an analysis. A search or `lowrank compress` applies damping."
    damped = ("none", unused) if damping is None else (f"{damping:g}", inverted)
    layout.metrics_row({**quality_metrics(facts), "Damping in use": damped})
    table = input_table(facts, spectra, damping)
    names = [name for name in QUALITIES if name != "damped_condition" or damping is not None]
    labels = {key: QUALITIES[key].label for key in names}
    name = pick("Quality", labels, key="quality", persist_state="session", width=330)
    quality = QUALITIES[name]
    chart(
        map_figure(quality_map(facts, table, name, module), module),
        key="quality_map",
        title=f"{quality.label} of every distinct input",
        how=f"{quality.meaning}. A row is an input, named by the module types that read it; click a cell to look into one of them.",
        alt=f"Map of {quality.label.lower()} by block and input",
        data=table,
        on_pick=state.pick_from_chart("module", "quality_map"),
    )
    with st.expander(f"All {len(facts.inputs)} distinct inputs"):
        tables.show(inputs_spec(table), key="input_table", height=320)

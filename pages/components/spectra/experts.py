"""Experts of the current module's mixture."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.overview.calibration_quality import calibration_facts
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.studio.spectra.expert_chart import expert_figure
from lowrank_core.studio.spectra.expert_table import expert_statement, expert_table, experts_spec
from lowrank_core.studio.spectra.spectrum_table import spectrum_named
from pages.components import state, tables
from pages.components.charts import chart

__all__ = ["show"]


def show(run: Run, spectra: Sequence[LayerSpectrum], module: str, facts: RunFacts) -> None:
    """Compare the experts of the mixture that ``module`` belongs to; draw nothing outside one."""
    shape = spectrum_named(spectra, module).shape
    if shape.expert is None:
        return
    table = expert_table(spectra, module, calibration_facts(run), facts)
    st.subheader("Experts of this mixture", anchor=False)
    st.markdown(expert_statement(table))
    chart(
        expert_figure(table, shape.expert),
        key="experts",
        title=f"Tokens that reach each expert's {shape.kind.rpartition('.')[2]} matrix",
        how="an expert with few tokens has uncertain moments, which are mixed with those of all experts. Click a bar to choose the expert.",
        alt=f"Bars of the tokens routed to each of {len(table)} experts",
        data=table,
        on_pick=state.pick_from_chart("module", "experts"),
    )
    with st.expander("Table of experts"):
        pick = state.pick_from_table("module", "experts_table", list(table["module"]))
        tables.show(experts_spec(table), key="experts_table", height=320, on_pick=pick)

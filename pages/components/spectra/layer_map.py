"""Map of all modules, and its profile over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import streamlit as st

from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.shared.formatting import percent
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.studio.spectra.depth_profile_chart import profile_figure
from lowrank_core.studio.spectra.map_metrics import METRICS, offered, sources_of
from lowrank_core.studio.spectra.spectrum_chart import metric_chart
from lowrank_core.studio.spectra.spectrum_table import atlas, atlas_spec
from pages.components import charts, state, tables
from pages.components.widgets import choose, pick

__all__ = ["show"]


def show(spectra: Sequence[LayerSpectrum], facts: RunFacts, protocol: str) -> None:
    """Draw the choice of a metric, its map, profile and table."""
    metric, source, relative, facts = _choice(facts, sources_of(spectra))
    names = [spectrum.shape.name for spectrum in spectra]
    view = atlas(spectra, metric, source, relative=relative, facts=facts)
    spec = metric_chart(view, metric, source, state.module_of(names))
    hint = "Click a cell, or choose a module below: everything follows."
    charts.show(spec, key="spectra_map", hint=hint, on_pick=state.pick_from_chart("module", "spectra_map"))
    if protocol:
        st.caption(protocol)
    charts.chart(
        profile_figure(view),
        key="spectra_profile",
        title="Against depth",
        how="each line is a module type, named at its end; a gap is where it is not defined.",
        alt=f"{spec.title} against depth, a line for each module type",
        data=view.frame,
    )
    with st.expander("Table"):
        pick = state.pick_from_table("module", "spectra_table", names)
        tables.show(atlas_spec(spectra, metric, facts), key="spectra_table", height=320, on_pick=pick)


def _choice(facts: RunFacts, known: Mapping[str, str]) -> tuple[str, str, bool, RunFacts]:
    """Draw the choice; return metric, source, whether it is relative, and the facts at the chosen ratio."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        labels = {name: METRICS[name].label for name in offered(facts)}
        name = pick("Metric", labels, key="metric", persist_state="session", width=330)
        metric = METRICS[name]
        source = ""
        if metric.sources:
            sources = {name: label for name, label in known.items() if name in metric.sources}
            source = choose("Of", sources, key=f"metric_source_{len(sources)}")
        if metric.name == "cost":
            facts = replace(facts, kept=_ratio(facts))
        relative = metric.ranks and st.toggle("As share of full rank", key="metric_relative", value=True, persist_state="session")
    return name, source, relative, facts


def _ratio(facts: RunFacts) -> float | None:
    labels = {kept: percent(kept, 0) for kept in facts.costs}
    return pick("Kept of the module", labels, facts.kept, key="metric_kept", persist_state="session", width=160)

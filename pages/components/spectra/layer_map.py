"""Map of all modules, and its profile over depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import streamlit as st

from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studio.shared.formatting import percent
from lowrank_core.studio.shared.layer_map_chart import map_figure
from lowrank_core.studio.shared.module_choices import RunFacts
from lowrank_core.studio.spectra.depth_profile_chart import profile_figure
from lowrank_core.studio.spectra.map_metrics import METRICS, SOURCES, Metric, offered
from lowrank_core.studio.spectra.spectrum_table import atlas, atlas_spec
from pages.components import state, tables
from pages.components.charts import chart
from pages.components.widgets import choose, pick

__all__ = ["show"]


@dataclass(frozen=True)
class _Choice:
    metric: Metric
    source: str
    relative: bool

    @property
    def title(self) -> str:
        of = f" of every module's {self.source}" if self.source else ", module by module"
        return f"{self.metric.label}{of}"


def show(spectra: Sequence[LayerSpectrum], facts: RunFacts, protocol: str) -> None:
    """Draw the choice of a metric, its map, profile and table."""
    chosen, facts = _choice(facts)
    names = [spectrum.shape.name for spectrum in spectra]
    view = atlas(spectra, chosen.metric.name, chosen.source, relative=chosen.relative, facts=facts)
    reading = "dark cells are low-rank" if chosen.metric.ranks and chosen.metric.name != "outliers" else "bright cells are higher"
    chart(
        map_figure(view, state.module_of(names)),
        key="spectra_map",
        title=chosen.title,
        how=f"{chosen.metric.meaning}; {reading}, a dash is where it is not defined. Click a cell, or choose a module below: "
        "everything follows.",
        alt=f"Map of {chosen.title.lower()} by block and module type",
        data=view.frame,
        on_pick=state.pick_from_chart("module", "spectra_map"),
    )
    st.caption(protocol)
    chart(
        profile_figure(view),
        key="spectra_profile",
        title="Against depth",
        how="each line is a module type, named at its end; a gap is where it is not defined.",
        alt=f"{chosen.title} against depth, a line for each module type",
        data=view.frame,
    )
    with st.expander("Table"):
        pick = state.pick_from_table("module", "spectra_table", names)
        tables.show(atlas_spec(spectra, chosen.metric.name, facts), key="spectra_table", height=320, on_pick=pick)


def _choice(facts: RunFacts) -> tuple[_Choice, RunFacts]:
    """Draw the choice; return it with the facts at the chosen ratio."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        labels = {name: METRICS[name].label for name in offered(facts)}
        name = pick("Metric", labels, key="metric", persist_state="session", width=330)
        metric = METRICS[name]
        source = ""
        if metric.sources:
            source = choose("Of", {name: SOURCES[name] for name in metric.sources}, key=f"metric_source_{len(metric.sources)}")
        if metric.name == "cost":
            facts = replace(facts, kept=_ratio(facts))
        relative = metric.ranks and st.toggle("As share of full rank", key="metric_relative", value=True, persist_state="session")
    return _Choice(metric, source, relative), facts


def _ratio(facts: RunFacts) -> float | None:
    labels = {kept: percent(kept, 0) for kept in facts.costs}
    return pick("Kept of the module", labels, facts.kept, key="metric_kept", persist_state="session", width=160)

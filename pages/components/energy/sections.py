"""Sections of the Feature energy page: energy curves, measured loss, pooling."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.spectra.spectrum import LayerSpectrum
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.energy.energy_chart import band_figure, energy_figure, groups_figure, pooling_figure
from lowrank_core.studio.energy.energy_table import energy_at_rank, energy_band, energy_curves, measured_loss, pooling_curves
from lowrank_core.studio.overview.calibration_quality import InputFacts, group_table
from lowrank_core.studio.shared.formatting import kind_label, percent
from lowrank_core.studio.shared.protocol import trial_protocol
from lowrank_core.studio.shared.table import Column, Table
from pages.components import navigation, tables
from pages.components.charts import chart
from pages.components.widgets import choose

__all__ = ["curves", "loss", "pooling"]


def curves(spectra: Sequence[LayerSpectrum], spectrum: LayerSpectrum, rank: int) -> None:
    """Draw retained and discarded energy by rank, of the module or of its type."""
    kind = spectrum.shape.kind
    alike = sum(other.shape.kind == kind for other in spectra)
    scopes = {"module": "This module", "type": f"All {alike} {kind_label(kind)} modules"}
    scope = choose("Energy of", scopes, key="energy_scope")
    columns = dict(zip(("kept", "removed"), st.columns(2, gap="large"), strict=True))
    for what, column in columns.items():
        with column:
            if scope == "type":
                _type(spectra, kind, scopes["type"], energy_at_rank(spectrum, rank).share_of_full_rank, what)
            else:
                _module(spectrum, rank, what)


_READING = {"kept": "a curve that rises early is low-rank; features often are, weights less so", "removed": "log scale"}


def _module(spectrum: LayerSpectrum, rank: int, what: str) -> None:
    curves = energy_curves(spectrum)
    chart(
        energy_figure(curves, what, rank),
        key=f"energy_{what}",
        title=f"Energy {what}",
        how=f"the share of the energy {'up to' if what == 'kept' else 'beyond'} a rank; {_READING[what]}.",
        alt=f"Cumulative energy {what} of features and weights of {spectrum.shape.name} against rank",
        data=curves,
    )


def _type(spectra: Sequence[LayerSpectrum], kind: str, name: str, rank_share: float, what: str) -> None:
    band = energy_band(spectra, kind)
    chart(
        band_figure(band, what, rank_share),
        key=f"energy_{what}_type",
        title=f"Energy {what}, {name[0].lower()}{name[1:]}",
        how=f"the line is the median module, the band holds the middle half of them; {_READING[what]}.",
        alt=f"Median and quartiles of the energy {what} by features and weights of {name.lower()}",
        data=band,
    )


def loss(run: Run, spectrum: LayerSpectrum, rank: int) -> None:
    """Show the measured loss of trials near the kept fraction of ``rank``."""
    search = run.config.search
    result = measured_loss(read_trials(run), energy_at_rank(spectrum, rank).parameters_kept) if search is not None else None
    st.markdown("**Measured loss**")
    if result is None:
        st.caption("Energy is not a loss, and this run has no measured loss yet: a rank search measures its baselines first.")
        st.page_link(navigation.SEARCH, label="Measure it in a rank search", icon=":material/query_stats:")
        return
    st.caption(result.sentence())
    columns = (
        Column.text("name", "Allocation"),
        Column.share("kept", "Kept, linears"),
        Column.number("kl", "KL (nats/token)"),
        Column.number("perplexity", "Perplexity", 3),
    )
    tables.show(Table(result.frame, columns, "Measured loss at the nearest kept fraction"), key="energy_loss")
    st.caption(trial_protocol(run))
    st.page_link(navigation.COMPARE, label="On test text", icon=":material/balance:")


def pooling(spectrum: LayerSpectrum, entry: InputFacts | None) -> None:
    """Draw the effect of pooling on the module, and the spread of its groups."""
    module = spectrum.shape.name
    if entry is not None:
        st.caption(
            f"Input `{entry.input_group}`, {entry.width} wide, read by {entry.readers}: "
            f"pooling moved its covariance by {percent(entry.pooled_to_sample, 2)} (relative Frobenius distance)."
        )
    result = pooling_curves(spectrum)
    left, right = st.columns(2, gap="large")
    with left:
        chart(
            pooling_figure(result),
            key="pooling",
            title="Feature eigenvalues, pooled and sample",
            how="where the curves differ, part of the variance comes from differences between groups of text.",
            alt=f"Square roots of pooled and sample feature eigenvalues of {module}",
            data=result,
        )
    if entry is None or not entry.group_traces:
        return
    groups = group_table(entry)
    with right:
        chart(
            groups_figure(groups),
            key="groups",
            title="Variance of each group",
            how="long bars are groups of text with a larger or smaller input variance than the rest.",
            alt="Deviation of the trace of each group's covariance from the mean of groups",
            data=groups,
        )

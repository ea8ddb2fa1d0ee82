"""Charts of the spectra of a module."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go

from lowrank_core.studio.shared.chart_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Chart,
    direct_label,
    dotted,
    finished,
    log_rank_axis,
    log_value_axis,
    note,
)
from lowrank_core.studio.shared.layer_map import LayerMap
from lowrank_core.studio.shared.layer_map_chart import map_figure
from lowrank_core.studio.spectra.density import Density
from lowrank_core.studio.spectra.map_metrics import METRICS, SOURCES
from lowrank_core.studio.spectra.spectrum_table import RankMark, ScreeCurves, scree_table
from lowrank_core.types import Vector

__all__ = ["density_figure", "metric_chart", "scree_chart", "scree_figure"]

_LABELLED = (0.1, 0.5)
"""Names are written at full rank to these powers: further right the curves fall too steeply."""

_HEADROOM, _DEEPEST = 0.35, -9.0  # decades
_ROOM = 0.25  # of the height of the curves
_STEP = 0.065  # of the height, between the labels of marked ranks
_FILLS = {BLUE: "rgba(0,114,178,0.25)", VERMILLION: "rgba(213,94,0,0.25)"}


def metric_chart(view: LayerMap, metric: str, source: str, chosen: str | None = None, protocol: str = "") -> Chart:
    """Return the map of a metric (a name in METRICS) of ``source``, if it has any."""
    about = METRICS[metric]
    of = f" of every module's {SOURCES[source].split(' ')[0].lower()}" if source else ", module by module"
    title = f"{about.label}{of}{', as a share of full rank (%)' if about.ranks and view.percent else ''}"
    reading = "dark cells are low-rank" if about.ranks and about.name != "outliers" else "bright cells are higher"
    return Chart(
        map_figure(view, chosen),
        view.frame,
        name=f"map-{source or metric}",
        title=title,
        how=f"{about.meaning}; {reading}, a dash is where it is not defined. Columns are blocks, rows module types.",
        alt=f"Map of {title[0].lower()}{title[1:]} by block and module type",
        protocol=protocol,
    )


def scree_chart(curves: ScreeCurves, about: str = "", words: str = "", protocol: str = "") -> Chart:
    """Return the spectra of a module; ``about`` follows its name in the title, and ``words`` the reading aid."""
    shuffled = " The shuffled matrix has the same entries in random places: what lies above it is structure."
    return Chart(
        scree_figure(curves),
        scree_table(curves),
        name="scree",
        title=f"Spectra of {curves.shape.name}{about}",
        how="a curve that falls fast is low-rank; left of a break-even rank the factors are smaller than the matrix. The dashes are the "
        f"Marchenko-Pastur edge of a random matrix with the same entry variance.{shuffled if curves.shuffled is not None else ''}{words}",
        alt=f"Singular values of the weight and square roots of feature eigenvalues of {curves.shape.name}, on log axes",
        protocol=protocol,
    )


def scree_figure(curves: ScreeCurves) -> go.Figure:
    """Draw singular values of W and √ feature eigenvalues, normalised, with the random-matrix reference and marked ranks."""
    figure = go.Figure()
    for name, colour, values in _curves(curves):
        hover = f"rank %{{x}}<br>%{{y:.3g}} of the first<extra>{name}</extra>"
        figure.add_scatter(x=curves.ranks, y=values, name=name, mode="lines", line={"color": colour, "width": 2.5}, hovertemplate=hover)
    _chance(figure, curves)
    _label_curves(figure, curves)
    for position, mark in enumerate(curves.marks):
        _mark(figure, mark, position, curves.shape.max_rank)
    finished(figure, height=420, x="Rank (log scale)", y="Value relative to the first (log scale)")
    log_rank_axis(figure, curves.shape.max_rank)
    log_value_axis(figure)
    figure.update_yaxes(range=[_least(curves), _HEADROOM])
    return figure


def _least(curves: ScreeCurves) -> float:
    """Return log₁₀ of where the value axis begins: below the curves there is room for the names of ranks."""
    drawn = np.concatenate([curves.weights, curves.features])
    positive = drawn[np.isfinite(drawn)]
    minimum = max(_DEEPEST, float(np.log10(positive.min()))) if positive.size else -1.0
    return minimum - _ROOM * (_HEADROOM - minimum)


def _curves(curves: ScreeCurves) -> tuple[tuple[str, str, Vector], ...]:
    return ("weights σ", BLUE, curves.weights), ("features √λ", VERMILLION, curves.features)


def _chance(figure: go.Figure, curves: ScreeCurves) -> None:
    """Draw the shuffled matrix, if measured, and the bulk edge of a random matrix."""
    full, names = curves.shape.max_rank, []
    if curves.shuffled is not None:
        hover = "rank %{x}<br>%{y:.3g} of the first σ of W<extra>entries of W, shuffled</extra>"
        line = {"color": GREY, "width": 1.5}
        figure.add_scatter(x=curves.ranks, y=curves.shuffled, name="shuffled", mode="lines", line=line, hovertemplate=hover)
        names.append("shuffled W (line)")
    if curves.bulk_edge is None:
        return
    names.append("Marchenko-Pastur (dashes)")
    line, edge = {"color": GREY, "width": 1.5, "dash": "dash"}, [curves.bulk_edge] * 2
    figure.add_scatter(x=[1, full], y=edge, mode="lines", line=line, hovertemplate="%{y:.3g} of the first σ of W<extra></extra>")
    x, y = math.log10(full), math.log10(curves.bulk_edge)
    direct_label(figure, "<br>".join(names), x=x, y=y, colour=GREY, xanchor="right", yanchor="bottom")


def _mark(figure: go.Figure, mark: RankMark, position: int, full: int) -> None:
    """Draw a marked rank; its label stands left of the line, each on a height of its own."""
    colour = GREEN if "trial" in mark.label.lower() else GREY
    left = math.log(mark.rank) > 0.45 * math.log(max(2, full))
    dotted(figure, mark.rank, colour)
    place = {"x": math.log10(mark.rank), "y": 0.01 + _STEP * position, "anchor": "right" if left else "left"}
    note(figure, f"{mark.label} {mark.rank}", colour=colour, yanchor="bottom", **place)  # type: ignore[arg-type]


def _label_curves(figure: go.Figure, curves: ScreeCurves) -> None:
    """Write each name on the outer side of its curve, the upper one further left; none for one that is all gaps."""
    low, high = (int(np.searchsorted(curves.ranks, curves.shape.max_rank**power)) for power in _LABELLED)
    above = curves.weights[high] >= curves.features[high]
    for name, colour, values in _curves(curves):
        upper = above == (colour == BLUE)
        at, xanchor, yanchor = (low, "left", "bottom") if upper else (high, "right", "top")
        if values[at] > 0:
            x, y = float(np.log10(curves.ranks[at])), float(np.log10(values[at]))
            direct_label(figure, name, x=x, y=y, colour=colour, xanchor=xanchor, yanchor=yanchor)


def density_figure(result: Density) -> go.Figure:
    """Draw the eigenvalue density by decades, with the Marchenko-Pastur law for weights and the start of the tail."""
    colour, name = (VERMILLION, "λ of the features") if result.source == "features" else (BLUE, "σ² of W")
    hover = "%{x:.3g} of the mean<br>%{y:.2f} of all per decade<extra>" + name + "</extra>"
    figure = go.Figure(
        go.Scatter(
            x=np.repeat(result.edges, 2),
            y=np.concatenate([[0.0], np.repeat(result.shares, 2), [0.0]]),
            mode="lines",
            fill="tozeroy",
            fillcolor=_FILLS[colour],
            line={"color": colour, "width": 1.5},
            hovertemplate=hover,
        )
    )
    top = float(max(result.shares.max(), result.bulk["share_per_decade"].max() if len(result.bulk) else 0.0))
    if len(result.bulk):
        figure.add_scatter(
            x=result.bulk["x"],
            y=result.bulk["share_per_decade"],
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dash"},
            hovertemplate="%{x:.3g} of the mean<br>%{y:.2f} of all per decade<extra>random matrix</extra>",
        )
    _density_notes(figure, result)
    finished(figure, height=340, x=f"{name}, over their mean (log scale)", y="Share of all, per decade")
    ends = math.log10(result.edges[0]), math.log10(max(result.edges[-1], result.bulk_edge or 0.0))
    figure.update_xaxes(type="log", exponentformat="power", dtick=1, title={"standoff": 16}, range=[ends[0] - 0.1, ends[1] + 0.1])
    figure.update_yaxes(range=[0, 1.32 * top], tickformat=".0%")
    return figure


def _density_notes(figure: go.Figure, result: Density) -> None:
    """Mark the bulk edge and the start of the fitted tail, with coloured labels at the top right."""
    notes: list[tuple[float, str, str]] = []
    if result.bulk_edge is not None:
        notes.append((result.bulk_edge, f"end of a random matrix's bulk · {result.beyond} beyond", GREY))
    if result.tail_from is not None:
        notes.append((result.tail_from, result.tail.partition(",")[0] + " from here on", ORANGE))
    for position, (x, text, colour) in enumerate(notes):
        dotted(figure, x, colour)
        note(figure, text, x=1, y=1 - 0.08 * position, colour=colour, anchor="right", xref="paper", xshift=0)

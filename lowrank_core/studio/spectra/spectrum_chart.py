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
from lowrank_core.studio.spectra.spectrum_table import ScreeCurves, scree_table
from lowrank_core.types import Vector

__all__ = ["density_figure", "metric_chart", "scree_chart", "scree_figure"]

_UPPER, _LOWER = 0.1, (0.5, 0.4, 0.6, 0.3)
"""The names of the upper and of the lower curve are written at full rank to these powers, further right the curves fall too steeply;
the lower one's at the first where no marked rank is."""

_DEEPEST = -9.0  # decades
_ABOVE, _BELOW = 0.2, 0.28  # of the height of the curves: room for the names of chance, and for those of marked ranks
_STEP = 0.065  # of the height, between the labels of marked ranks
_MIDDLE = 0.45  # of the rank axis
_NAME_ROOM = 0.17  # of the rank axis, which the name of a curve takes
_DECADES = 5  # that can each have a number at 400 pixels
_NOTE_STEP = 0.08  # of the height, between the notes of a density
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
    _mark_ranks(figure, curves)
    finished(figure, height=420, x="Rank (log scale)", y="Value relative to the first (log scale)")
    log_rank_axis(figure, curves.shape.max_rank)
    log_value_axis(figure)
    figure.update_yaxes(range=list(_value_range(curves)))
    return figure


def _value_range(curves: ScreeCurves) -> tuple[float, float]:
    """Return log₁₀ of where the value axis begins and ends."""
    drawn = np.concatenate([curves.weights, curves.features])
    positive = drawn[np.isfinite(drawn)]
    minimum = max(_DEEPEST, float(np.log10(positive.min()))) if positive.size else -1.0
    depth = max(1.0, -minimum)
    return minimum - _BELOW * depth, _ABOVE * depth


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
    direct_label(figure, "<br>".join(names), x=math.log10(full), y=_value_range(curves)[1], colour=GREY, xanchor="right", yanchor="top")


def _mark_ranks(figure: go.Figure, curves: ScreeCurves) -> None:
    """Draw the marked ranks; no line runs through the label of another.

    A large rank has its label left of its line, a small one right of it. A line begins at its own label, below which are those of the
    ranks further out, and ends at the curves, above which their names stand.
    """
    full = max(2, curves.shape.max_rank)
    large = [mark for mark in curves.marks if math.log(mark.rank) > _MIDDLE * math.log(full)]
    small = [mark for mark in curves.marks if mark not in large]
    for position, mark in enumerate([*small, *reversed(large)]):
        colour, y = GREEN if "trial" in mark.label.lower() else GREY, 0.01 + _STEP * position
        dotted(figure, mark.rank, colour, start=y, end=max(y + _STEP, _height(curves, mark.rank)))
        anchor = "right" if mark in large else "left"
        note(figure, f"{mark.label} {mark.rank}", x=math.log10(mark.rank), y=y, colour=colour, anchor=anchor, yanchor="bottom")


def _height(curves: ScreeCurves, rank: int) -> float:
    """Return how high the upper curve is at ``rank``, as a fraction of the axis."""
    at = min(int(np.searchsorted(curves.ranks, rank)), len(curves.ranks) - 1)
    values = [float(values[at]) for _, _, values in _curves(curves) if values[at] > 0]
    low, high = _value_range(curves)
    return min(1.0, (math.log10(max(values)) - low) / (high - low)) if values else 1.0


def _label_curves(figure: go.Figure, curves: ScreeCurves) -> None:
    """Write each name on the outer side of its curve, the upper one further left; none for one that is all gaps."""
    both = not (np.isnan(curves.weights).all() or np.isnan(curves.features).all())
    low, high = (int(np.searchsorted(curves.ranks, curves.shape.max_rank**p)) for p in (_UPPER, _lower(curves) if both else _LOWER[0]))
    above = curves.weights[high] >= curves.features[high]
    for name, colour, values in _curves(curves):
        upper = above == (colour == BLUE)
        at, xanchor, yanchor = (low, "left", "bottom") if upper else (high, "right", "top")
        if values[at] > 0:
            x, y = float(np.log10(curves.ranks[at])), float(np.log10(values[at]))
            direct_label(figure, name, x=x, y=y, colour=colour, xanchor=xanchor, yanchor=yanchor)


def _lower(curves: ScreeCurves) -> float:
    full = math.log(max(2, curves.shape.max_rank))
    marks = [math.log(mark.rank) / full for mark in curves.marks]
    free = (power for power in _LOWER if not any(power - _NAME_ROOM < mark < power + 0.02 for mark in marks))
    return next(free, _LOWER[0])


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
    figure.update_xaxes(
        type="log",
        exponentformat="power",
        dtick=1 if ends[1] - ends[0] < _DECADES else 2,
        title={"standoff": 16},
        range=[ends[0] - 0.1, ends[1] + 0.1],
    )
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
        dotted(figure, x, colour, end=1 - _NOTE_STEP * len(notes))
        note(figure, text, x=1, y=1 - _NOTE_STEP * position, colour=colour, anchor="right", xref="paper", xshift=0)

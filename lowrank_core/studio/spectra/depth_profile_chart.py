"""A metric against depth, a line for each module type."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lowrank_core.studio.shared.chart_style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, finished
from lowrank_core.studio.shared.formatting import kind_label
from lowrank_core.studio.shared.layer_map import LayerMap

__all__ = ["profile_figure"]

_COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross")
_DASHES = ("solid", "dash", "dot")
_GAP = 0.062
"""Of the height: labels are no closer."""


def profile_figure(view: LayerMap) -> go.Figure:
    """Draw the values of a map over depth, a labelled line per type; missing values are gaps."""
    figure = go.Figure()
    ends: list[tuple[float, str, str]] = []
    for index, kind in enumerate(view.kinds):
        rows = view.cells[view.cells["kind"] == kind].sort_values("depth")
        colour, name = _COLOURS[index % len(_COLOURS)], kind_label(kind)
        figure.add_scatter(
            x=rows["depth"].to_numpy(),
            y=rows["value"].to_numpy(),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": _DASHES[index // len(_COLOURS) % len(_DASHES)]},
            marker={"symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 7 if len(view.depths) <= 40 else 4},
            customdata=rows[["label"]].to_numpy(),
            hovertemplate="block %{x}<br>%{customdata[0]}<extra>" + name + "</extra>",
        )
        last = rows["value"].dropna()
        if len(last):
            ends.append((_place(float(last.iloc[-1]), view), name, colour))
    finished(figure, height=360, x="Block (depth, from the embedding to the head)", y=view.measure, right=72)
    low, high = _range(view)
    figure.update_yaxes(range=[low, high], tickformat=".0%" if view.percent else "", type="log" if view.log else "linear")
    span = max(1, len(view.depths) - 1)
    first = view.depths[0] if view.depths else 0
    step = max(1, len(view.depths) // 16)
    figure.update_xaxes(range=[first - 0.02 * span, first + 1.01 * span], tickvals=view.depths[::step])
    _label_ends(figure, ends, low, high)
    return figure


def _place(value: float, view: LayerMap) -> float:
    """Return where a value stands on the axis: a log axis counts powers of ten."""
    return math.log10(value) if view.log else value


def _range(view: LayerMap) -> tuple[float, float]:
    finite = [_place(value, view) for value in view.frame["value"] if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    low = min(0.0, low) if view.low == 0 and not view.log else low
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _label_ends(figure: go.Figure, ends: list[tuple[float, str, str]], low: float, high: float) -> None:
    """Write each name next to its line's end, moved up as far as the one below needs."""
    place = -math.inf
    for value, name, colour in sorted(ends):
        place = max((value - low) / (high - low), place + _GAP)
        figure.add_annotation(
            text=f"<b>{name}</b>",
            x=1,
            xref="paper",
            y=place,
            yref="paper",
            showarrow=False,
            xanchor="left",
            yanchor="middle",
            xshift=6,
            font={"color": colour, "size": 12},
        )

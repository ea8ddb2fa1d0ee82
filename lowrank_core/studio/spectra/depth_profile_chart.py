"""A metric against depth, a line for each module type."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from lowrank_core.studio.shared.chart_style import block_axis, end_labels, finished, type_style
from lowrank_core.studio.shared.formatting import kind_label
from lowrank_core.studio.shared.layer_map import LayerMap

__all__ = ["profile_figure"]


def profile_figure(view: LayerMap) -> go.Figure:
    """Draw the values of a map over depth, a labelled line per type; missing values are gaps."""
    figure = go.Figure()
    span, first = max(1, len(view.depths) - 1), view.depths[0] if view.depths else 0
    end = first + 1.01 * span
    ends: list[tuple[str, float, float, str]] = []
    for kind in view.kinds:
        rows = view.cells[view.cells["kind"] == kind].sort_values("depth")
        look, name = type_style(view.kinds, kind), kind_label(kind)
        figure.add_scatter(
            x=rows["depth"].to_numpy(),
            y=rows["value"].to_numpy(),
            name=name,
            mode="lines+markers",
            line={"color": look["color"], "width": 2, "dash": look["dash"]},
            marker={"symbol": look["symbol"], "size": 7 if len(view.depths) <= 40 else 4},
            customdata=rows[["label"]].to_numpy(),
            hovertemplate="block %{x}<br>%{customdata[0]}<extra>" + name + "</extra>",
        )
        last = rows["value"].dropna()
        if len(last):
            ends.append((name, end, _place(float(last.iloc[-1]), view), look["color"]))
    longest = max((len(kind_label(kind)) for kind in view.kinds), default=0)
    finished(figure, height=360, x="Block (depth, from the embedding to the head)", y=view.measure, right=max(72, 9 * longest))
    low, high = _range(view)
    figure.update_yaxes(range=[low, high], tickformat=".0%" if view.percent else "", type="log" if view.log else "linear")
    block_axis(figure, view.depths, first - 0.02 * span, end)
    end_labels(figure, ends, low, high)
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

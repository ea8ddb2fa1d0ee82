"""Shared parts of the live Vega-Lite charts.

Not in Plotly like the other charts: Streamlit 1.67 builds a Plotly chart again whenever its data change, which flickers and
loses the zoom; to a Vega-Lite chart it sends the new rows. All that grows is therefore data, and the specification constant.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from lowrank_core.studio.shared.chart_style import ORANGE, TRIAL_MARKS, VERMILLION, VegaChart, word_colour

__all__ = [
    "LEGEND",
    "PICKED",
    "PICTURED",
    "SIDES",
    "ZOOM",
    "Spec",
    "VegaChart",
    "name_mark",
    "name_side",
    "picking",
    "stacked",
    "trial_points",
    "trial_ring",
]

Spec = dict[str, Any]

PICKED = "picked"
"""Name of the selection that holds the trial under a click."""
ZOOM = "zoom"
"""Name of the selection that holds the visible part. Streamlit resets it with new data unless it is reported to listen to it."""

PICTURED = [{"field": "note", "type": "nominal", "title": "title"}, {"field": "picture", "type": "nominal", "title": "image"}]
"""For ``tooltip``: words with a picture below; the two titles are those that vega-tooltip draws so."""

_HOURGLASS = "M-1,-1L1,-1L-1,1L1,1Z"
_SALTIRE = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
_STAR = "M0,-1L.235,-.324L.951,-.309L.38,.124L.588,.809L0,.4L-.588,.809L-.38,.124L-.951,-.309L-.235,-.324Z"
_MARKS = {
    kind: ({"star": _STAR, "hourglass": _HOURGLASS, "x": _SALTIRE}.get(symbol, symbol.removesuffix("-open")), colour)
    for kind, (symbol, colour) in TRIAL_MARKS.items()
}
"""As TRIAL_MARKS, with shapes of Vega."""
_HOLLOW = ("stopped early",)


LEGEND: Spec = {"legend": {"orient": "top", "title": None, "columns": {"expr": "width < 420 ? 2 : 4"}}}
"""For ``config``: a legend above the chart that a narrow window holds, too."""


SIDES = ("below", "below left", "above")
"""Label positions of a baseline."""


def stacked(*frames: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all ``frames``; missing columns are empty."""
    filled = [frame for frame in frames if not frame.empty]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]


def name_side(position: int, count: int) -> str:
    """Return the label side of the baseline at ``position`` from the lowest; neighbours alternate."""
    if position == count - 1:
        return "above"
    return "below" if position == 0 else "below left"


def name_mark(side: str) -> Spec:
    """Return the mark that writes a baseline's name."""
    left = side.endswith("left")
    place = {"align": "left" if left else "right", "dx": 4 if left else -4, "dy": -8 if side == "above" else 10}
    return {"type": "text", **place, "color": word_colour(ORANGE), "fontSize": 12, "fontWeight": 600, "clip": True}


def picking(*moved: str) -> list[Spec]:
    """Return the selections of a chart of trials: a click picks one; the view moves along the axes ``moved`` (both if none is named)."""
    move: Spec = {"type": "interval", "zoom": "wheel![event.ctrlKey]", **({"encodings": list(moved)} if moved else {})}
    return [
        {"name": PICKED, "select": {"type": "point", "fields": ["number"], "toggle": False}},
        # Drag to move, double click to reset; the wheel alone scrolls the page.
        {"name": ZOOM, "select": move, "bind": "scales"},
    ]


def trial_points(x: Spec, y: Spec, *moved: str) -> Spec:
    """Return the layer of trials that can be picked and moved: rows ``trial`` with columns number, kind and note."""
    colours = [colour for _, colour in _MARKS.values()]
    fills = ["transparent" if kind in _HOLLOW else colour for kind, (_, colour) in _MARKS.items()]
    by_kind = {"field": "kind", "type": "nominal"}
    return {
        "params": picking(*moved),
        "transform": [{"filter": "datum.row == 'trial'"}],
        "mark": {"type": "point", "size": 95, "strokeWidth": 1.8, "opacity": 1, "clip": True, "cursor": "pointer"},
        "encoding": {
            "x": x,
            "y": y,
            "shape": {**by_kind, "scale": {"domain": list(_MARKS), "range": [shape for shape, _ in _MARKS.values()]}},
            "stroke": {**by_kind, "scale": {"domain": list(_MARKS), "range": colours}},
            "fill": {**by_kind, "scale": {"domain": list(_MARKS), "range": fills}},
            "tooltip": {"field": "note"},
        },
    }


def trial_ring(x: Spec, y: Spec) -> Spec:
    """Return the layer that puts a ring around the chosen trial."""
    mark = {"type": "point", "filled": False, "size": 330, "color": VERMILLION, "strokeWidth": 2.5, "opacity": 1, "clip": True}
    return {"transform": [{"filter": "datum.row == 'trial' && datum.chosen"}], "mark": mark, "encoding": {"x": x, "y": y}}

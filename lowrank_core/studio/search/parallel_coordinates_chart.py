"""Charts of trial parameters as coloured strips, and of variable importance as bars."""

from __future__ import annotations

import pandas as pd

from lowrank_core.studio.search.parallel_coordinates import Fingerprint
from lowrank_core.studio.shared.chart_style import BLUE, ORANGE, VERMILLION
from lowrank_core.studio.shared.vega import Spec, VegaChart, picking

__all__ = ["fingerprint_chart", "importance_chart"]

_ROW, _AXIS, _LEGEND = 26, 56, 66  # pixels: a variable, the axis below, the legend above; Streamlit fits all of them into the height
_VARIABLES: Spec = {
    "field": "variable",
    "type": "ordinal",
    "sort": None,
    "title": None,
    "axis": {"domain": False, "ticks": False, "labelLimit": 220, "labelOverlap": False},
}
"""A row for each variable, in the order of the table."""
_LEVELS = "datum.value == 0 ? 'min of its range' : 'max of its range'"


def fingerprint_chart(view: Fingerprint, chosen: int | None = None) -> VegaChart:
    """Draw a column per trial, best at the left, and a row per variable; bright is the maximum of its range."""
    frame = view.frame[["number", "place", "left", "right", "variable", "position", "note"]]
    return VegaChart(frame.assign(chosen=frame["number"] == (-1 if chosen is None else chosen)), _strips(view.variables))


def _strips(variables: int) -> Spec:
    axis = {"format": "d", "tickMinStep": 1, "grid": False}
    scale = {"nice": False, "zero": False}
    x = {"field": "left", "type": "quantitative", "title": "Trials by value (1 is the best)", "scale": scale, "axis": axis}
    colour = {
        "field": "position",
        "type": "quantitative",
        "scale": {"scheme": "cividis", "domain": [0, 1]},
        "legend": {"orient": "top", "title": None, "values": [0, 1], "labelExpr": _LEVELS, "gradientLength": 260},
    }
    both = {"x": x, "x2": {"field": "right"}}
    strip = {"type": "rect", "clip": True, "cursor": "pointer"}
    frame = {"type": "rect", "clip": True, "filled": False, "stroke": VERMILLION, "strokeWidth": 2.5}
    ring = {"filter": "datum.chosen"}, {"aggregate": [], "groupby": ["left", "right"]}
    return {
        "height": _ROW * max(1, variables) + _AXIS + _LEGEND,
        "layer": [
            {"params": picking("x"), "mark": strip, "encoding": {**both, "y": _VARIABLES, "color": colour, "tooltip": {"field": "note"}}},
            {"transform": list(ring), "mark": frame, "encoding": {**both, "y": {"value": 0}, "y2": {"value": "height"}}},
        ],
    }


def importance_chart(frame: pd.DataFrame) -> VegaChart:
    """Draw a bar for each variable of an ``importance_table``, with its 90 % interval as a line."""
    axis = {"format": ".0%", "tickCount": 5}
    x = {
        "field": "share",
        "type": "quantitative",
        "title": "Share of the variance (estimate)",
        "scale": {"domain": [0, 1]},
        "axis": axis,
    }
    tip = {"field": "note"}
    bar = {"type": "bar", "color": BLUE, "height": {"band": 0.55}}
    line = {"type": "rule", "color": ORANGE, "strokeWidth": 3}
    return VegaChart(
        frame,
        {
            "height": _ROW * max(1, len(frame)) + _AXIS,
            "layer": [
                {"mark": bar, "encoding": {"x": x, "y": _VARIABLES, "tooltip": tip}},
                {"mark": line, "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": _VARIABLES, "tooltip": tip}},
            ],
        },
    )

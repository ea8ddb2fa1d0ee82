"""Live chart of a trial's losses by window."""

from __future__ import annotations

from lowrank_core.studio.search.trial_windows import WindowLosses
from lowrank_core.studio.shared.chart_style import BLUE, GREEN, GREY
from lowrank_core.studio.shared.vega import Spec, VegaChart

__all__ = ["window_chart"]


def window_chart(view: WindowLosses) -> VegaChart:
    """Draw the loss on each window: dots for the trial, bars for the other, a stem between them."""
    return VegaChart(view.frame, _spec(view.measure))


def _spec(measure: str) -> Spec:
    x = {
        "field": "window",
        "type": "quantitative",
        "title": "Search-validation window",
        "scale": {"nice": False, "zero": False, "padding": 12},
        "axis": {"format": "d", "tickMinStep": 1, "grid": False},
    }

    def y(field: str) -> Spec:
        return {
            "field": field,
            "type": "quantitative",
            "title": measure,
            "scale": {"zero": False},
            "axis": {"format": "~g", "tickCount": 5},
        }

    both = [{"filter": "isValid(datum.shown) && isValid(datum.other)"}]
    tip = {"field": "note"}
    stem = {"mark": {"type": "rule", "color": GREY, "strokeWidth": 1.2}, "encoding": {"x": x, "y": y("shown"), "y2": {"field": "other"}}}
    other = {"type": "point", "shape": "stroke", "size": 150, "strokeWidth": 3, "color": GREEN, "opacity": 1}
    shown = {"type": "point", "shape": "circle", "size": 55, "filled": True, "color": BLUE, "opacity": 1}
    return {
        "height": 220,
        "layer": [
            {"transform": both, **stem},
            _points(other, "other", x, y("other"), tip),
            _points(shown, "shown", x, y("shown"), tip),
        ],
    }


def _points(mark: Spec, field: str, x: Spec, y: Spec, tip: Spec) -> Spec:
    return {"transform": [{"filter": f"isValid(datum.{field})"}], "mark": mark, "encoding": {"x": x, "y": y, "tooltip": tip}}

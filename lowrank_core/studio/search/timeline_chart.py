"""Trials over time, a row for each worker."""

from __future__ import annotations

import pandas as pd

from lowrank_core.studio.shared.vega import LEGEND, Spec, VegaChart, trial_points, trial_ring

__all__ = ["timeline_chart"]

_CLOCK = {"seconds": "%H:%M:%S", "minutes": "%H:%M", "hours": "%H:%M", "day": "%d %b", "date": "%d %b"}
_ROW, _AROUND = 46, 130  # pixels: a worker; axis and legend, which Streamlit fits into the height, too


def timeline_chart(frame: pd.DataFrame, chosen: int | None = None) -> VegaChart:
    """Draw each trial of a ``timeline`` as a bar with a mark for its outcome."""
    rows = frame.assign(row="trial", chosen=frame["number"] == (-1 if chosen is None else chosen))
    return VegaChart(rows, _spec(max(1, frame["worker"].nunique())))


def _spec(workers: int) -> Spec:
    axis = {"grid": False, "labelOverlap": True, "format": _CLOCK}
    time = {"type": "temporal", "title": "Time of this browser", "scale": {"padding": 12}, "axis": axis}
    y = {
        "field": "worker",
        "type": "ordinal",
        "title": None,
        "axis": {"labelLimit": {"expr": "width < 420 ? 80 : 180"}, "domain": False, "ticks": False},
    }
    end = {**time, "field": "end"}
    points = trial_points(end, y, "x")
    span = {"x": {**time, "field": "start"}, "x2": {"field": "end"}, "y": y}
    bar = {
        "mark": {"type": "rule", "strokeWidth": 12, "opacity": 0.4, "clip": True},
        "encoding": {**span, "stroke": points["encoding"]["stroke"], "tooltip": {"field": "note"}},
    }
    return {
        "height": _ROW * workers + _AROUND,
        "layer": [bar, points, trial_ring(end, y)],
        "config": {"legend": {**LEGEND["legend"], "symbolOpacity": 1}},
    }

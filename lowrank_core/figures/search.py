"""A rank search as it streams in, in Vega-Lite.

Not in Plotly like the other figures: Streamlit 1.67 builds a Plotly chart anew whenever its data change, which flickers and
loses the zoom; to a Vega-Lite chart it sends the new rows. All that grows is therefore data, and the specification constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from lowrank_core.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from lowrank_core.views.search import History

__all__ = ["PICKED", "ZOOM", "VegaChart", "history_chart"]

Spec = dict[str, Any]

PICKED = "picked"
"""Name of the selection that holds the trial under a click."""
ZOOM = "zoom"
"""Name of the selection that holds the visible part. Streamlit resets it with new data unless it is told to listen to it."""

_BASELINES = ("uniform", "lord_manual")
_HOURGLASS = "M-1,-1L1,-1L-1,1L1,1Z"
_SALTIRE = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
_MARKS = {
    "sampled": ("circle", BLUE),
    "baseline": ("diamond", ORANGE),
    "running": (_HOURGLASS, GREEN),
    "waiting": ("triangle-right", GREY),
    "failed": (_SALTIRE, VERMILLION),
    "pruned": ("triangle-down", PURPLE),
    "infeasible": ("square", SKY),
}
"""What a trial is -> shape and colour; told apart without the colour."""
_LEAST_TRIALS = 10  # room on the axis from the beginning


@dataclass(frozen=True)
class VegaChart:
    """A table and the specification that draws it."""

    data: pd.DataFrame
    spec: Spec


def history_chart(view: History, chosen: int | None = None) -> VegaChart:
    """Draw value against trial: points by state, the best so far as steps, baselines as dashed lines with their names.

    Trials without a value (running, failed) stand above all others.
    """
    rows = [_trial_rows(view.trials, chosen), _baseline_rows(view)]
    data = pd.concat([frame for frame in rows if not frame.empty], ignore_index=True) if any(not frame.empty for frame in rows) else rows[0]
    return VegaChart(data, _spec(view.objective))


def _trial_rows(trials: pd.DataFrame, chosen: int | None) -> pd.DataFrame:
    complete = trials.loc[trials["state"] == "complete", "value"]
    what = trials["state"].where(
        trials["state"] != "complete", trials["label"].map(lambda label: "baseline" if label in _BASELINES else "sampled")
    )
    return pd.DataFrame(
        {
            "row": "trial",
            "number": trials["number"],
            "value": trials["value"].fillna(_above(complete)),
            "best": trials["best"],
            "what": what,
            "note": trials["note"],
            "chosen": trials["number"] == (-1 if chosen is None else chosen),
        }
    )


def _above(values: pd.Series) -> float:
    """Return a height above all ``values`` on a log axis."""
    return 1.0 if values.empty else float(values.max() * max(1.08, (values.max() / values.min()) ** 0.1))


def _baseline_rows(view: History) -> pd.DataFrame:
    """Return a row for each baseline; the least is labelled below its line, the others above, so that names do not meet."""
    ordered = sorted(view.baselines.items(), key=lambda pair: pair[1])
    return pd.DataFrame(
        {
            "row": ["below" if position == 0 and len(ordered) > 1 else "above" for position in range(len(ordered))],
            "value": [value for _, value in ordered],
            "note": [f"{name} {value:.4g}" for name, value in ordered],
        }
    )


def _only(row: str) -> list[Spec]:
    return [{"filter": row}]


def _height(objective: str) -> Spec:
    scale = {"type": "log", "nice": False, "padding": 22}
    axis = {"format": "~g", "tickCount": 8}
    return {"field": "value", "type": "quantitative", "title": f"{objective}, log scale", "scale": scale, "axis": axis}


def _across(**domain: object) -> Spec:
    scale = {"nice": False, "zero": False, "padding": 14, **domain}
    axis = {"format": "d", "tickMinStep": 1, "grid": False}
    return {"field": "number", "type": "quantitative", "title": "Trial (in the order of asking)", "scale": scale, "axis": axis}


def _spec(objective: str) -> Spec:
    height = _height(objective)
    names = [_names(height, row) for row in ("above", "below")]
    return {
        "height": 380,
        "layer": [_rules(height), *names, _best_line(height), _points(height), _ring(height)],
        "config": {"legend": {"orient": "top", "title": None}},
    }


def _best_line(height: Spec) -> Spec:
    mark = {"type": "line", "interpolate": "step-after", "color": GREEN, "strokeWidth": 2.5, "clip": True}
    encoding = {"x": _across(), "y": {**height, "field": "best"}}
    return {"transform": _only("datum.row == 'trial' && isValid(datum.best)"), "mark": mark, "encoding": encoding}


def _rules(height: Spec) -> Spec:
    mark = {"type": "rule", "color": ORANGE, "strokeDash": [6, 4], "strokeWidth": 1.5, "clip": True}
    return {"transform": _only("datum.row != 'trial'"), "mark": mark, "encoding": {"y": height}}


def _names(height: Spec, row: str) -> Spec:
    mark = {
        "type": "text",
        "align": "right",
        "dx": -4,
        "dy": -8 if row == "above" else 10,
        "color": ORANGE,
        "fontSize": 12,
        "fontWeight": 600,
        "clip": True,
    }
    return {
        "transform": _only(f"datum.row == '{row}'"),
        "mark": mark,
        "encoding": {"x": {"value": "width"}, "y": height, "text": {"field": "note"}},
    }


def _points(height: Spec) -> Spec:
    domain = list(_MARKS)
    shapes, colours = [shape for shape, _ in _MARKS.values()], [colour for _, colour in _MARKS.values()]
    return {
        "params": [
            {"name": PICKED, "select": {"type": "point", "fields": ["number"], "toggle": False}},
            # Drag to move, double click to reset; the wheel alone scrolls the page.
            {"name": ZOOM, "select": {"type": "interval", "zoom": "wheel![event.ctrlKey]"}, "bind": "scales"},
        ],
        "transform": _only("datum.row == 'trial'"),
        "mark": {"type": "point", "filled": True, "size": 95, "opacity": 1, "clip": True, "cursor": "pointer"},
        "encoding": {
            "x": _across(domain={"unionWith": [-0.5, _LEAST_TRIALS - 0.5]}),
            "y": height,
            "shape": {"field": "what", "type": "nominal", "scale": {"domain": domain, "range": shapes}},
            "color": {"field": "what", "type": "nominal", "scale": {"domain": domain, "range": colours}},
            "tooltip": {"field": "note"},
        },
    }


def _ring(height: Spec) -> Spec:
    mark = {"type": "point", "filled": False, "size": 330, "color": VERMILLION, "strokeWidth": 2.5, "opacity": 1, "clip": True}
    return {"transform": _only("datum.row == 'trial' && datum.chosen"), "mark": mark, "encoding": {"x": _across(), "y": height}}

"""Live chart of a search's history."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lowrank_core.studio.search.history import History, above
from lowrank_core.studio.shared.chart_style import GREEN, ORANGE
from lowrank_core.studio.shared.thumbnail_chart import BLANK
from lowrank_core.studio.shared.vega import (
    LEGEND,
    PICTURED,
    SIDES,
    Spec,
    VegaChart,
    name_mark,
    name_side,
    stacked,
    trial_points,
    trial_ring,
)

__all__ = ["history_chart"]

_MAX_PICTURED = 400_000  # characters of all pictures: a figure stays well below a megabyte
_NEWEST = 30
_MIN_TRIALS = 10  # room on the axis from the beginning


def history_chart(view: History, chosen: int | None = None, pictures: Mapping[int, str] | None = None) -> VegaChart:
    """Draw value against trial: points by kind, the best so far as steps, baselines as dashed lines with their names.

    ``pictures`` (trial -> address of a picture) are shown next to the words when the pointer is on a trial; of very many, those of the
    newest trials and of the best.

    A trial that was stopped early stands at the loss of the windows it saw; those without any (running, failed) above all others.
    """
    return VegaChart(
        stacked(_trial_rows(view.trials, chosen, _affordable(view.trials, pictures or {})), _baseline_rows(view)), _spec(view.objective)
    )


def _affordable(trials: pd.DataFrame, pictures: Mapping[int, str]) -> dict[int, str]:
    """Return pictures of the newest and the best trials, within the size limit."""
    newest = trials["number"].sort_values(ascending=False)[:_NEWEST]
    kept: dict[int, str] = {}
    left = _MAX_PICTURED
    for number in dict.fromkeys([*newest, *trials.sort_values("value")["number"]]):
        left -= len(pictures.get(number, ""))
        if left < 0:
            break
        if number in pictures:
            kept[number] = pictures[number]
    return kept


def _trial_rows(trials: pd.DataFrame, chosen: int | None, pictures: Mapping[int, str]) -> pd.DataFrame:
    height = trials["value"].fillna(trials["partial"])
    return pd.DataFrame(
        {
            "row": "trial",
            "number": trials["number"],
            "value": height.fillna(above(height.dropna())),
            "best": trials["best"],
            "kind": trials["kind"],
            "note": trials["note"],
            "picture": [pictures.get(number, BLANK) for number in trials["number"]],
            "chosen": trials["number"] == (-1 if chosen is None else chosen),
        }
    )


def _baseline_rows(view: History) -> pd.DataFrame:
    """Return a row for each baseline; neighbouring labels alternate sides."""
    ordered = sorted(view.baselines.items(), key=lambda pair: pair[1])
    return pd.DataFrame(
        {
            "row": [name_side(position, len(ordered)) for position in range(len(ordered))],
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
    axis = {"format": "d", "tickMinStep": 1, "grid": False, "labelExpr": "datum.value < 0 ? '' : datum.label"}
    return {"field": "number", "type": "quantitative", "title": "Trial (in trial order)", "scale": scale, "axis": axis}


def _spec(objective: str) -> Spec:
    height = _height(objective)
    names = [_names(height, row) for row in SIDES]
    points = trial_points(_across(domain={"unionWith": [-0.5, _MIN_TRIALS - 0.5]}), height)
    # What is read aloud are the words; the picture's address would be, too.
    points["encoding"] |= {"tooltip": PICTURED, "description": {"field": "note"}}
    return {
        "height": 400,
        "layer": [_rules(height), _best_line(height), *names, points, trial_ring(_across(), height)],
        "config": LEGEND,
    }


def _best_line(height: Spec) -> Spec:
    mark = {"type": "line", "interpolate": "step-after", "color": GREEN, "strokeWidth": 2.5, "clip": True}
    encoding = {"x": _across(), "y": {**height, "field": "best"}}
    return {"transform": _only("datum.row == 'trial' && isValid(datum.best)"), "mark": mark, "encoding": encoding}


def _rules(height: Spec) -> Spec:
    mark = {"type": "rule", "color": ORANGE, "strokeDash": [6, 4], "strokeWidth": 1.5, "clip": True}
    return {"transform": _only("datum.row != 'trial'"), "mark": mark, "encoding": {"y": height}}


def _names(height: Spec, row: str) -> Spec:
    return {
        "transform": _only(f"datum.row == '{row}'"),
        "mark": name_mark(row),
        "encoding": {"x": {"value": 0 if row.endswith("left") else "width"}, "y": height, "text": {"field": "note"}},
    }

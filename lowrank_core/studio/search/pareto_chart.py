"""Chart of loss against compression ratio."""

from __future__ import annotations

import pandas as pd

from lowrank_core.studio.search.pareto import Front
from lowrank_core.studio.shared.chart_style import GREEN, ORANGE
from lowrank_core.studio.shared.vega import LEGEND, SIDES, Spec, VegaChart, name_mark, name_side, stacked, trial_points, trial_ring

__all__ = ["front_chart"]


def front_chart(view: Front, chosen: int | None = None) -> VegaChart:
    """Draw value against the fraction removed: trials by kind, the Pareto front as steps, baselines joined by dashed lines."""
    trials = view.trials.assign(row="trial", chosen=view.trials["number"] == (-1 if chosen is None else chosen))
    rules = view.baselines.drop(columns="number").assign(row="baseline")
    data = stacked(trials, view.best.assign(row="front"), rules, _names(rules))
    return VegaChart(data.reindex(columns=["row", "number", "removed", "value", "kind", "note", "label", "chosen"]), _spec(view.objective))


def _names(rules: pd.DataFrame) -> pd.DataFrame:
    """Return label positions of baselines: the highest above its end, the lowest below, one between at its start."""
    ends = rules.groupby("label", as_index=False).last().sort_values("value")
    first = rules.groupby("label", as_index=False).first().set_index("label").loc[list(ends["label"])].reset_index()
    sides = [name_side(position, len(ends)) for position in range(len(ends))]
    at_first = pd.Series([side.endswith("left") for side in sides], dtype=bool)
    result = ends.reset_index(drop=True)
    result[["removed", "value"]] = first[["removed", "value"]].where(at_first, result[["removed", "value"]], axis=0)
    return result.assign(row=[f"name {side}" for side in sides])


def _spec(objective: str) -> Spec:
    x = {
        "field": "removed",
        "type": "quantitative",
        "title": "Fraction of parameters removed",
        "scale": {"nice": False, "zero": False, "padding": 26},
        "axis": {"format": ".0%", "tickCount": 8, "grid": False},
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": f"{objective}, log scale",
        "scale": {"type": "log", "nice": False, "padding": 22},
        "axis": {"format": "~g", "tickCount": 8},
    }
    steps = {"type": "line", "interpolate": "step-before", "color": GREEN, "strokeWidth": 2.5, "clip": True}
    dashes = {"type": "line", "color": ORANGE, "strokeDash": [6, 4], "strokeWidth": 1.5, "clip": True}
    return {
        "height": 400,
        "layer": [
            _layer("baseline", dashes, {"x": x, "y": y, "detail": {"field": "label"}}),
            *(_layer(f"name {side}", name_mark(side), {"x": x, "y": y, "text": {"field": "label"}}) for side in SIDES),
            _layer("front", steps, {"x": x, "y": y}),
            trial_points(x, y),
            trial_ring(x, y),
        ],
        "config": LEGEND,
    }


def _layer(row: str, mark: Spec, encoding: Spec) -> Spec:
    return {"transform": [{"filter": f"datum.row == '{row}'"}], "mark": mark, "encoding": encoding}

"""Pareto front of a search over a range of ratios: data and live chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import OBJECTIVES, SearchConfig
from lowrank_core.studies.records import TrialRecord, pareto_front
from lowrank_core.studio.search.history import value_columns
from lowrank_core.studio.shared.chart_style import GREEN, ORANGE
from lowrank_core.studio.shared.table import Column, Table, frame_of
from lowrank_core.studio.shared.trial_names import kind_of, trial_label, trial_note
from lowrank_core.studio.shared.vega import LEGEND, SIDES, Spec, VegaChart, name_mark, name_side, stacked, trial_points, trial_ring

__all__ = ["Front", "front", "front_chart", "front_spec", "front_table"]


@dataclass(frozen=True)
class Front:
    """Trials by compression ratio and loss.

    Attributes:
        objective: label of the value, with its unit.
        trials: columns number, kind, removed, value, note; measured trials only.
        best: columns number, removed, value of the Pareto front, by what is removed.
        baselines: columns label, removed, value, by label and by what is removed.
    """

    objective: str
    trials: pd.DataFrame
    best: pd.DataFrame
    baselines: pd.DataFrame


def front(trials: Sequence[TrialRecord], objective: str) -> Front:
    """Return the measured trials, their Pareto front, and the baselines among them."""
    measured = [trial for trial in trials if trial.finished and trial.value is not None and trial.compression_ratio is not None]
    best = pareto_front(trials)
    rules = sorted(
        (trial for trial in measured if trial.label in ALLOCATORS), key=lambda trial: (trial.label, trial.compression_ratio or 0.0)
    )
    return Front(
        OBJECTIVES[objective],
        _frame(measured).assign(kind=[kind_of(trial) for trial in measured], note=[trial_note(trial) for trial in measured]),
        _frame(best),
        _frame(rules).assign(label=[ALLOCATORS[trial.label].label for trial in rules]),
    )


def _frame(trials: Sequence[TrialRecord]) -> pd.DataFrame:
    return frame_of(trials, number="number", removed="compression_ratio", value="value").astype({"removed": float, "value": float})


def front_table(trials: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return a row for each trial of the Pareto front, by what is removed."""
    return frame_of(
        pareto_front(trials),
        trial="number",
        name=trial_label,
        removed="compression_ratio",
        value="value",
        perplexity="perplexity",
        kl="kl",
    )


def front_spec(trials: Sequence[TrialRecord], search: SearchConfig) -> Table:
    """Return ``front_table`` as it is shown."""
    columns = (Column.text("name", "On the front"), Column.share("removed", "Removed, linears", digits=2), *value_columns(search))
    return Table(front_table(trials), columns, "Pareto front: no other trial removes as much at a lower loss", "pareto-front")


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

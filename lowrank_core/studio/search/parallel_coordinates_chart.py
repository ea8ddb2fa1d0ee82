"""Trials by value against their variables, and the importance of variables: data and live charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.config import SearchConfig
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.variables import Importance, Importances, VariableRange
from lowrank_core.studio.search.history import Variable, search_variables
from lowrank_core.studio.shared.chart_style import BLUE, ORANGE, VERMILLION
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.table import frame_of
from lowrank_core.studio.shared.trial_names import trial_note
from lowrank_core.studio.shared.vega import Spec, VegaChart, picking

__all__ = ["Fingerprint", "fingerprint", "fingerprint_chart", "importance_chart", "importance_table", "missing_words"]

_MAX_TRIALS, _MAX_VARIABLES = 160, 24


@dataclass(frozen=True)
class Fingerprint:
    """Trials x variables.

    Attributes:
        frame: columns number, place (1 is the best value), left and right (of its strip), variable (label), position (of the value in
            the variable's range, in [0, 1]), value, note; a row for each trial and variable, by place.
        trials, variables: how many are shown.
        of_trials, of_variables: how many there are; the rest is left out (the worst trials; the variables whose order over the trials
            goes least with that of the values).
    """

    frame: pd.DataFrame
    trials: int
    variables: int
    of_trials: int
    of_variables: int


def fingerprint(trials: Sequence[TrialRecord], search: SearchConfig, ranges: Mapping[str, VariableRange]) -> Fingerprint | None:
    """Return the trial-variable table of measured sampled trials; None below two."""
    measured = [trial for trial in trials if trial.finished and trial.params and trial.value is not None]
    ordered = sorted(measured, key=lambda trial: (trial.value, trial.number))
    if len(ordered) < 2:
        return None
    known = [variable for variable in search_variables(ordered, search) if variable.name in ranges]
    shown = ordered[:_MAX_TRIALS]
    variables = _telling(shown, known, ranges)
    rows = [
        _cell(trial, place, variable, ranges[variable.name])
        for place, trial in enumerate(shown, start=1)
        for variable in variables
        if variable.name in trial.params
    ]
    columns = ["number", "place", "left", "right", "variable", "position", "value", "note"]
    return Fingerprint(pd.DataFrame(rows, columns=columns), len(shown), len(variables), len(ordered), len(known))


def _cell(trial: TrialRecord, place: int, variable: Variable, span: VariableRange) -> dict[str, object]:
    value = trial.params[variable.name]
    return {
        "number": trial.number,
        "place": place,
        "left": place - 0.5,
        "right": place + 0.5,
        "variable": variable.label,
        "position": span.position(value),
        "value": value,
        "note": f"{variable.label} {number(value)} · {trial_note(trial)}",
    }


def _telling(trials: Sequence[TrialRecord], variables: Sequence[Variable], ranges: Mapping[str, VariableRange]) -> list[Variable]:
    """Return at most ``count`` variables best correlated with the value, in their own order."""
    if len(variables) <= _MAX_VARIABLES:
        return list(variables)

    def strength(variable: Variable) -> float:
        positions = [ranges[variable.name].position(trial.params[variable.name]) for trial in trials if variable.name in trial.params]
        ranks = np.argsort(np.argsort(positions)).astype(float)
        spread = ranks.std()
        places = np.arange(len(ranks), dtype=float)
        return abs(float(((ranks - ranks.mean()) * (places - places.mean())).mean())) / spread if spread > 0 else 0.0

    kept = set(sorted((variable.name for variable in variables), key=lambda name: -strength(_named(variables, name)))[:_MAX_VARIABLES])
    return [variable for variable in variables if variable.name in kept]


def _named(variables: Sequence[Variable], name: str) -> Variable:
    return next(variable for variable in variables if variable.name == name)


def importance_table(result: Importances, trials: Sequence[TrialRecord], search: SearchConfig) -> pd.DataFrame:
    """Return a row for each drawn variable, the most important first: columns variable, share, low, high, note."""
    labels = {variable.name: variable.label for variable in search_variables(trials, search)}

    def label(entry: Importance) -> str:
        return labels.get(entry.name, entry.name)

    return frame_of(
        result.found[:_MAX_VARIABLES],
        variable=label,
        share="share",
        low="low",
        high="high",
        note=lambda entry: f"{label(entry)}: {entry.share:.0%}, 90 % interval {entry.low:.0%} to {entry.high:.0%}",
    )


def missing_words(result: Importances) -> str:
    """Return the reason for missing importances; empty otherwise."""
    if not result.missing:
        return ""
    more = "1 more sampled trial is" if result.missing == 1 else f"{result.missing} more sampled trials are"
    so_far = "1 trial" if result.trials == 1 else f"{result.trials or 'no'} trials"
    return f"The importance of variables can't be estimated from {so_far} that set them all: {more} needed."


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

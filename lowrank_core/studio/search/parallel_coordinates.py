"""Trials by value against their variables, and the importance of variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.config import SearchConfig
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.variables import Importances, VariableRange
from lowrank_core.studio.search.history import Variable, search_variables
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.trial_names import trial_note

__all__ = ["Fingerprint", "fingerprint", "importance_table", "missing_words"]

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
    rows = [
        {
            "variable": labels.get(entry.name, entry.name),
            "share": entry.share,
            "low": entry.low,
            "high": entry.high,
            "note": f"{labels.get(entry.name, entry.name)}: {entry.share:.0%}, 90 % interval {entry.low:.0%} to {entry.high:.0%}",
        }
        for entry in result.found[:_MAX_VARIABLES]
    ]
    return pd.DataFrame(rows, columns=["variable", "share", "low", "high", "note"])


def missing_words(result: Importances) -> str:
    """Return the reason for missing importances; empty otherwise."""
    if not result.missing:
        return ""
    more = "1 more sampled trial is" if result.missing == 1 else f"{result.missing} more sampled trials are"
    so_far = "1 trial" if result.trials == 1 else f"{result.trials or 'no'} trials"
    return f"The importance of variables can't be estimated from {so_far} that set them all: {more} needed."

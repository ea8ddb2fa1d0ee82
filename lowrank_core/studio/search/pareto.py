"""Pareto front of a search over a range of ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import OBJECTIVES, SearchConfig
from lowrank_core.studies.records import TrialRecord, pareto_front
from lowrank_core.studio.search.history import value_columns
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import kind_of, trial_label, trial_note

__all__ = ["Front", "front", "front_spec", "front_table"]


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
    return pd.DataFrame(
        {
            "number": [trial.number for trial in trials],
            "removed": pd.Series([trial.compression_ratio for trial in trials], dtype=float),
            "value": pd.Series([trial.value for trial in trials], dtype=float),
        }
    )


def front_table(trials: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return a row for each trial of the Pareto front, by what is removed."""
    rows = [
        {
            "trial": trial.number,
            "name": trial_label(trial),
            "removed": trial.compression_ratio,
            "value": trial.value,
            "perplexity": trial.perplexity,
            "kl": trial.kl,
        }
        for trial in pareto_front(trials)
    ]
    return pd.DataFrame(rows, columns=["trial", "name", "removed", "value", "perplexity", "kl"])


def front_spec(trials: Sequence[TrialRecord], search: SearchConfig) -> Table:
    """Return ``front_table`` as it is shown."""
    columns = (Column.text("name", "On the front"), Column.share("removed", "Removed, linears", digits=2), *value_columns(search))
    return Table(front_table(trials), columns, "Pareto front: no other trial removes as much at a lower loss", "pareto-front")

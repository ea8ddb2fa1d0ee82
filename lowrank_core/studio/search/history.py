"""Data of a running search: history, baselines, best so far, trial table."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import OBJECTIVES, SearchConfig
from lowrank_core.studies.gain import flat_words
from lowrank_core.studies.records import TrialCounts, TrialRecord, best_trial, counts_of
from lowrank_core.studies.space import RATIO
from lowrank_core.studio.shared.formatting import DASH, local_time, number, percent
from lowrank_core.studio.shared.table import Column, Metrics, Table, filled, frame_of
from lowrank_core.studio.shared.trial_names import answers_of, kind_of, partial_value, trial_label, trial_note, unit_label

__all__ = [
    "WORK",
    "History",
    "Progress",
    "Variable",
    "above",
    "better_half",
    "headline",
    "history",
    "progress",
    "search_variables",
    "trials_spec",
    "value_columns",
]


_UNIT = re.compile(r"\.\d+\.")
"""In the name of a variable: the block of its unit; other variables are of a module type, such as ``experts.up``."""

_VALUES = tuple(Column.number(name, "") for name in ("value", "perplexity", "kl"))
WORK = (
    Column.text("worker", "Worker", "Machine and process that measured it.").of(lambda trial: trial.worker or None),
    Column("started", "Started", "moment").of(lambda trial: None if trial.started is None else local_time(trial.started)),
)
"""Columns of trials on who measured them and when: in the file, and on a page."""


@dataclass(frozen=True)
class History:
    """Trials of a study with baselines.

    Attributes:
        objective: label of the value, with its unit.
        trials: columns number, state, kind (one of ``KINDS``), value (NaN without one), partial (of what was stopped early: the mean
            over the windows it saw, where the objective is one), best (lowest value so far), note.
        baselines: label -> value of the enqueued baselines that are complete.
    """

    objective: str
    trials: pd.DataFrame
    baselines: Mapping[str, float]


def history(trials: Sequence[TrialRecord], objective: str) -> History:
    """Return the history of ``trials`` by number."""

    def partial(trial: TrialRecord) -> float | None:
        return partial_value(trial) if trial.state == "pruned" and objective == "kl" else None

    frame = frame_of(trials, number="number", state="state", kind=kind_of, value="value", partial=partial, note=trial_note)
    frame = frame.astype({"value": float, "partial": float})
    frame["best"] = frame["value"].where(frame["state"] == "complete").cummin().ffill()
    return History(OBJECTIVES[objective], frame, _baselines(trials))


def above(values: pd.Series) -> float:
    """Return a height above all ``values`` on a log axis, for trials that have none."""
    return 1.0 if values.empty else float(values.max() * max(1.08, (values.max() / values.min()) ** 0.1))


def better_half(view: History) -> History:
    """Return ``view`` without values worse than the median; the best baseline and trials without a value stay."""
    height = view.trials["value"].fillna(view.trials["partial"])
    limit = max([height.median(), *sorted(view.baselines.values())[:1]])
    kept = {name: value for name, value in view.baselines.items() if value <= limit}
    return replace(view, trials=view.trials[~(height > limit)], baselines=kept)


def _baselines(trials: Sequence[TrialRecord]) -> dict[str, float]:
    complete = [trial for trial in trials if trial.label in ALLOCATORS and trial.state == "complete"]
    return {ALLOCATORS[trial.label].label: trial.value for trial in complete if trial.value is not None}


@dataclass(frozen=True)
class Progress:
    """Progress of a search, and its best value against uniform, on search-validation text.

    Attributes:
        counts: of its trials.
        wanted: trials of the search, fewer where it stopped by itself.
        best: None without one, and for a search over a range of ratios.
        seconds: median time of a trial that was measured to the end.
    """

    counts: TrialCounts
    wanted: int
    best: TrialRecord | None
    uniform_value: float | None
    uniform_perplexity: float | None
    seconds: float | None = None

    @property
    def complete(self) -> int:
        """Finished trials, stopped early or not, without manual ones."""
        return self.counts.complete

    @property
    def gain(self) -> float | None:
        """The fraction by which the best value lies below the uniform one; None without both."""
        if self.best is None or self.best.value is None or not self.uniform_value:
            return None
        return 1 - self.best.value / self.uniform_value


def progress(trials: Sequence[TrialRecord], search: SearchConfig) -> Progress:
    """Return the progress of a search."""
    uniform = next((trial for trial in trials if trial.label == "uniform" and trial.state == "complete"), None)
    times = [trial.seconds for trial in trials if trial.finished and trial.seconds is not None]
    counts = counts_of(trials)
    return Progress(
        counts=counts,
        wanted=counts.complete if flat_words(trials, search) else search.trials,
        best=best_trial(trials) if search.max_ratio is None else None,
        uniform_value=uniform.value if uniform else None,
        uniform_perplexity=uniform.perplexity if uniform else None,
        seconds=statistics.median(times) if times else None,
    )


def headline(now: Progress, search: SearchConfig) -> Metrics:
    """Return the best trial next to uniform."""
    best = now.best
    return {
        "Best trial": (trial_label(best) if best else DASH, "The lowest value so far, on search-validation text."),
        "Best value": (
            number(best.value, 4) if best else DASH,
            f"{OBJECTIVES[search.objective]}; uniform: {number(now.uniform_value, 4)}.",
        ),
        "Its perplexity": (
            number(best.perplexity, 4) if best else DASH,
            f"On search-validation text; uniform: {number(now.uniform_perplexity, 4)}.",
        ),
        "Below uniform": (percent(now.gain), "How far the best value lies below that of the uniform baseline."),
        "Removed": (percent(best.compression_ratio, 2) if best else DASH, "Of the compressible linears' parameters, as counted."),
    }


def value_columns(search: SearchConfig) -> list[Column]:
    """Return the value columns of trials; the objective appears once."""
    columns = [
        Column.number("value", OBJECTIVES[search.objective]),
        Column.number("perplexity", "Perplexity", 2),
        Column.number("kl", "KL (nats/token)"),
    ]
    return [column for column in columns if column.name != search.objective]


def trials_spec(trials: Sequence[TrialRecord], search: SearchConfig, variables: int | None = None) -> Table:
    """Return a row for each trial, by number, with so many of the space's variables: all unless it is said; the file has them all."""
    chosen = {trial.number for trial in answers_of(trials, search)}
    mark = " ★ best" if search.max_ratio is None else " ★ front"
    variable = [Column.number(each.name, each.label, 3, each.meaning, 3) for each in search_variables(trials, search)]
    known = [column.of(partial(_variable_of, name=column.name)) for column in variable]
    first = (
        Column.whole("trial", "Trial").of("number"),
        Column.text("state", "State").of(lambda trial: kind_of(trial) if trial.state in ("pruned", "infeasible") else trial.state),
        Column.text("kind", "Kind", width=220).of(lambda trial: _kind(trial) + (mark if trial.number in chosen else "")),
    )
    removed = Column.share("removed", "Removed, linears", digits=2).of("compression_ratio")
    seconds = Column.number("seconds", "Seconds", 1, digits=3)
    columns = [*first, *value_columns(search), removed, seconds, *known[:variables]]
    return Table(
        filled(trials, [*first, *_VALUES, removed, seconds, *WORK, *known]), columns, "Every trial, on search-validation text", "trials"
    )


def _variable_of(trial: TrialRecord, name: str) -> float | None:
    return trial.params.get(name)


def _kind(trial: TrialRecord) -> str:
    return trial_label(trial).split(" (trial")[0] if trial.label != "sampled" else "sampled"


@dataclass(frozen=True)
class Variable:
    """A variable of the search space: its name in the study, the head of its column, and what its values mean."""

    name: str
    label: str
    meaning: str


def search_variables(trials: Sequence[TrialRecord], search: SearchConfig) -> list[Variable]:
    """Return the variables of the space, in the order of the study."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    return [_variable(name, search) for name in names]


def _variable(name: str, search: SearchConfig) -> Variable:
    if name == RATIO:
        return Variable(name, "Target ratio", "Fraction of parameters to remove, as proposed by the sampler.")
    group = unit_label(name) if _UNIT.search(name) else {"qk": "q, k"}.get(name, name.replace("_proj", ""))
    if search.variables == "error_weight":
        return Variable(
            name, f"Weight of {group}", "On the errors of these matrices when they are traded; 1 is the allocation `lagrangian`."
        )
    if search.projected:
        return Variable(name, f"Kept of {group}", "Kept fraction of these matrices, before scaling onto the budget.")
    return Variable(
        name, f"Kept of {group}", "Kept fraction of these matrices, as published: not scaled onto the budget; from 1 on they are dense."
    )

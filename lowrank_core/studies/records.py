"""Trials of a study as plain records, for pages and reports. Torch-free; imports optuna only."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from lowrank_core.allocation import current_name
from lowrank_core.errors import RunError
from lowrank_core.runs import Run
from lowrank_core.studies.storage import open_database, open_journal

__all__ = [
    "MANUAL",
    "TrialCounts",
    "TrialRecord",
    "best_trial",
    "counts_of",
    "pareto_front",
    "read_frozen",
    "read_rules",
    "read_trials",
    "records_of",
    "trials_of",
]

MANUAL = "manual"
"""Label of a manual allocation."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: from 0, in trial order.
        state: ``complete``, ``infeasible`` (measured, and outside the budget of a published search), ``running``, ``failed``,
            ``pruned`` (stopped early: its windows were worse than the best trial's) or ``waiting``.
        label: ``uniform``, ``lord_manual``… for an enqueued baseline, ``manual`` for a manual allocation, else ``sampled``.
        value: the objective on search-validation text; None unless complete or infeasible.
        params: variable of the space -> its value; empty where the ranks were given.
        ranks: unit -> rank, or None for dense; empty until the trial began.
        compression_ratio, kl, perplexity, tokens, seconds: as measured in the trial; None until then.
        windows: window -> its loss, as far as it was measured: KL, or NLL where the objective is another.
        started, ended: seconds since the epoch; None while it waits, or is measured.
        worker: ``host:pid`` that measured it, or empty.
        error: why it failed, or empty.
    """

    number: int
    state: str
    label: str
    value: float | None
    params: Mapping[str, float]
    ranks: Mapping[str, int | None]
    compression_ratio: float | None
    kl: float | None
    perplexity: float | None
    tokens: int | None
    seconds: float | None
    windows: Mapping[int, float] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    worker: str = ""
    error: str = ""

    @property
    def finished(self) -> bool:
        """Whether it was measured to the end, inside the budget or not."""
        return self.state in ("complete", "infeasible")


@dataclass(frozen=True)
class TrialCounts:
    """Number of trials by state: one count for pages, report and commands.

    Attributes:
        complete: of the search itself, measured to the end or stopped early: what its number of trials counts.
        pruned, outside: how many of those were stopped early, and lie outside the budget.
        manual: allocations that a person chose, measured; they come on top.
        failed: of either kind.
    """

    complete: int
    pruned: int = 0
    outside: int = 0
    manual: int = 0
    failed: int = 0

    @property
    def measured(self) -> int:
        """To the end, whoever chose them."""
        return self.complete - self.pruned + self.manual

    @property
    def parts(self) -> tuple[str, ...]:
        """Words next to the number of complete trials; empty where all counts are zero."""
        counted = (
            (self.pruned, "stopped early"),
            (self.outside, "outside the budget, measured and never the best"),
            (self.manual, "manual, on top"),
            (self.failed, "failed, not counted"),
        )
        return tuple(f"{count} {words}" for count, words in counted if count)

    @property
    def words(self) -> str:
        """All of it in a line."""
        parts = f" ({'; '.join(self.parts)})" if self.parts else ""
        return f"{self.complete} {'trial' if self.complete == 1 else 'trials'} complete{parts}"


def counts_of(trials: Sequence[TrialRecord]) -> TrialCounts:
    """Count ``trials`` of one study."""
    own = [trial for trial in trials if trial.label != MANUAL]
    pruned = sum(trial.state == "pruned" for trial in own)
    return TrialCounts(
        complete=sum(trial.finished for trial in own) + pruned,
        pruned=pruned,
        outside=sum(trial.state == "infeasible" for trial in own),
        manual=sum(trial.label == MANUAL and trial.finished for trial in trials),
        failed=sum(trial.state == "failed" for trial in trials),
    )


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
    TrialState.WAITING: "waiting",
}


@lru_cache(maxsize=2000)
def _ranks(words: str) -> Mapping[str, int | None]:
    # A live page reads every trial several times a second: a thousand of an 80-layer model took a tenth of a second each time.
    result: dict[str, int | None] = json.loads(words, object_pairs_hook=lambda pairs: {sys.intern(name): rank for name, rank in pairs})
    return result


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    complete = trial.state == TrialState.COMPLETE
    return TrialRecord(
        number=trial.number,
        state="infeasible" if complete and any(excess > 0 for excess in trial.constraints.values()) else _STATES[trial.state],
        label=current_name(attributes.get("label", "sampled")),
        value=trial.values[-1] if complete else None,
        params=dict(trial.params),
        ranks=_ranks(attributes.get("ranks", "{}")),
        compression_ratio=attributes.get("compression_ratio"),
        kl=attributes.get("kl"),
        perplexity=attributes.get("perplexity"),
        tokens=attributes.get("tokens"),
        seconds=attributes.get("seconds"),
        windows=dict(trial.intermediate_values),
        started=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        worker=attributes.get("worker", "").rsplit(":", 1)[0],
        error=attributes.get("error", ""),
    )


@lru_cache(maxsize=16)
def _reader(journal: Path, inode: int) -> BaseStorage:
    # Kept between ticks: the storage reads only what was appended since. The inode tells a new file at an old path.
    return open_journal(journal)


def _storage(run: Run) -> BaseStorage | None:
    url = run.storage_url
    if url is not None:
        return open_database(url)
    try:
        return _reader(run.journal, run.journal.stat().st_ino)
    except FileNotFoundError:
        return None


def read_trials(run: Run) -> list[TrialRecord]:
    """Return the trials of ``run`` by number; none if its search has not begun. Never writes.

    Raises:
        RunError: the journal is damaged, or the database has gone.
        ConfigError: the database that holds the study can't be reached.
    """
    return [_record(trial) for trial in read_frozen(run)]


def trials_of(run: Run) -> list[TrialRecord]:
    """Return the trials of ``run``; none where it searches for nothing.

    Raises:
        as ``read_trials``.
    """
    return read_trials(run) if run.config.search is not None else []


def read_frozen(run: Run) -> list[FrozenTrial]:
    """Return the trials of ``run`` as Optuna holds them, with the ranges of their variables; they must not be changed.

    Raises:
        as ``read_trials``.
    """
    try:
        storage = _storage(run)  # reads the journal already
        if storage is None:
            return []
        study_id = storage.get_study_id_from_name(run.study_name)
        return storage.get_all_trials(study_id, deepcopy=False)
    except KeyError:
        return []
    except ValueError as error:
        raise RunError(f"{run.journal} is damaged: {error}. Start a new search.") from error
    except (StorageInternalError, SQLAlchemyError) as error:
        raise RunError(f"the database of this run's study does not answer: {str(error).splitlines()[0]}. Is the server up?") from error


def read_rules(run: Run) -> str:
    """Return by which reading of Bolaco the trials of ``run`` were measured (``published.RULES``); empty for an earlier one's.

    Raises:
        as ``read_trials``.
    """
    if not read_frozen(run):
        return ""
    storage = _storage(run)
    assert storage is not None
    result: str = storage.get_study_user_attrs(storage.get_study_id_from_name(run.study_name)).get("rules", "")
    return result


def records_of(study: optuna.Study) -> list[TrialRecord]:
    """Return the trials of ``study`` by number."""
    return [_record(trial) for trial in study.get_trials(deepcopy=False)]


def best_trial(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the complete trial of lowest value (the earliest of equals), or None."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)


def pareto_front(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the complete trials that no other beats: none removes as much at less loss, nor more at the same. By ratio removed.

    Ratios within a thousandth are equal: whole ranks don't meet one more closely.
    """
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None and trial.compression_ratio is not None]
    front: list[TrialRecord] = []
    for trial in sorted(complete, key=lambda t: (-round(t.compression_ratio or 0.0, 3), t.value or 0.0, t.number)):
        if not front or (trial.value or 0.0) < (front[-1].value or 0.0):
            front.append(trial)
    return front[::-1]

"""Trials of a study as plain records, for pages and reports. Torch-free; imports optuna only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lowrank_core.errors import RunError
from lowrank_core.runs import Run

__all__ = ["TrialRecord", "best_trial", "open_storage", "read_trials"]

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: from 0, in the order of asking.
        state: ``complete``, ``infeasible`` (measured, and outside the budget of a published search), ``running``, ``failed``,
            ``pruned`` or ``waiting``.
        label: ``uniform``, ``lord_manual``… for an enqueued baseline, else ``sampled``.
        value: the objective on search-validation text; None unless complete or infeasible.
        params: variable of the space -> multiplier, as sampled.
        ranks: unit -> rank, or None for dense; empty until the trial began.
        compression_ratio, kl, perplexity, tokens, seconds: as measured in the trial; None until then.
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

    @property
    def finished(self) -> bool:
        """Whether it was measured to the end, inside the budget or not."""
        return self.state in ("complete", "infeasible")


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
    TrialState.WAITING: "waiting",
}


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    complete = trial.state == TrialState.COMPLETE
    return TrialRecord(
        number=trial.number,
        state="infeasible" if complete and any(excess > 0 for excess in trial.constraints.values()) else _STATES[trial.state],
        label=attributes.get("label", "sampled"),
        value=trial.value if complete else None,
        params=dict(trial.params),
        ranks=json.loads(attributes.get("ranks", "{}")),
        compression_ratio=attributes.get("compression_ratio"),
        kl=attributes.get("kl"),
        perplexity=attributes.get("perplexity"),
        tokens=attributes.get("tokens"),
        seconds=attributes.get("seconds"),
    )


def open_storage(journal: Path) -> JournalStorage:
    """Return the storage on the file ``journal``, made if it does not exist."""
    return JournalStorage(JournalFileBackend(str(journal)))


@lru_cache(maxsize=16)
def _reader(journal: Path, inode: int) -> JournalStorage:
    # Kept between ticks: the storage reads only what was appended since. The inode tells a new file at an old path.
    return open_storage(journal)


def read_trials(run: Run) -> list[TrialRecord]:
    """Return the trials of ``run`` by number; none if its search has not begun. Never writes.

    Raises:
        RunError: the journal is damaged.
    """
    try:
        inode = run.journal.stat().st_ino
    except FileNotFoundError:
        return []
    try:
        storage = _reader(run.journal, inode)
        study_id = storage.get_study_id_from_name(run.study_name)
        return [_record(trial) for trial in storage.get_all_trials(study_id, deepcopy=False)]
    except KeyError:
        return []
    except ValueError as error:
        raise RunError(f"{run.journal} is damaged: {error}. Start a new search.") from error


def best_trial(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the complete trial of least value (the earliest of equals), or None."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)

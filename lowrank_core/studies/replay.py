"""Trials of a search that was, put one by one into the study of another run: how a live search is shown without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from lowrank_core.errors import RunError
from lowrank_core.runs import Run
from lowrank_core.studies.storage import open_storage

__all__ = ["Replay"]


@dataclass(frozen=True)
class Replay:
    """Complete trials, and the study that they are copied into; after the last one they begin again."""

    trials: Sequence[FrozenTrial]
    study: optuna.Study

    @classmethod
    def begin(cls, source: Run, target: Run) -> Replay:
        """Make the study of ``target``, with no trial yet.

        Raises:
            RunError: ``source`` has no complete trial, or ``target`` can't be written.
        """
        try:
            result = optuna.load_study(study_name=source.study_name, storage=open_storage(source))
        except KeyError as error:
            raise RunError(f"{source.path} has no study to replay. Give a run whose search has begun.") from error
        complete = result.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if not complete:
            raise RunError(f"the search in {source.path} has no complete trial to replay. Wait for one, or give another run.")
        study = optuna.create_study(storage=open_storage(target), study_name=target.study_name, directions=result.directions)
        return cls(complete, study)

    def add(self, count: int = 1) -> None:
        """Add the next ``count`` trials."""
        done = len(self.study.get_trials(deepcopy=False))
        self.study.add_trials([self.trials[number % len(self.trials)] for number in range(done, done + count)])

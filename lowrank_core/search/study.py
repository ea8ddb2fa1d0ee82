"""The Optuna study of a run: made or reopened, baselines first, one trial at a time."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from lowrank_core.compression import low_rank_layers, swapped
from lowrank_core.config import SearchConfig
from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.models.handle import ModelHandle
from lowrank_core.recipe import Decomposed
from lowrank_core.runs import Run
from lowrank_core.search.objective import objective_value
from lowrank_core.search.records import open_storage
from lowrank_core.search.space import BASELINES, SearchSpace
from lowrank_core.text.windows import WindowSet

__all__ = ["TrialBench", "completed_trials", "open_study", "run_trial"]


@dataclass(frozen=True)
class TrialBench:
    """Everything that trials share: nothing in it is computed twice.

    Attributes:
        decomposed: the dense model, in which a trial swaps layers and puts them back, and the nested factors of its units.
        windows: search-validation windows, never the test ones.
        dense: the dense model's log-probabilities on them.
        space: variables and budget.
        batch_size: windows in a forward pass.
    """

    decomposed: Decomposed
    windows: WindowSet
    dense: DenseReference
    space: SearchSpace
    batch_size: int

    @property
    def handle(self) -> ModelHandle:
        return self.decomposed.handle


def _sampler(config: SearchConfig, finished: int) -> BaseSampler:
    # A resumed search draws on, not the same points again; an uninterrupted one depends on the seed alone.
    seed = (config.seed + 1_000_003 * finished) % 2**32
    if config.sampler == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # `deterministic_objective`: ours is, bit for bit
        return GPSampler(seed=seed, n_startup_trials=config.startup_trials, deterministic_objective=True)


def open_study(run: Run, config: SearchConfig, space: SearchSpace) -> optuna.Study:
    """Return the run's study with its baselines enqueued; what a dead worker left in flight is cleared up and marked failed.

    The caller holds the run: nobody else writes to its journal.
    """
    _clear_leftovers(run.journal)
    storage = open_storage(run.journal)
    study = optuna.create_study(storage=storage, study_name=run.study_name, direction="minimize", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    study.sampler = _sampler(config, completed_trials(study))
    kept = (TrialState.COMPLETE, TrialState.WAITING)
    present = {trial.user_attrs.get("label") for trial in study.get_trials(deepcopy=False, states=kept)}
    for label in BASELINES:
        if label not in present:
            study.enqueue_trial(space.baseline(label), user_attrs={"label": label})
    return study


def _clear_leftovers(journal: Path) -> None:
    """Remove the lock and the unfinished line of a worker that was killed while it wrote."""
    # Optuna would wait half a minute for the lock, and refuse the journal once something follows the torn line.
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    body = journal.read_bytes()
    whole = body.rfind(b"\n") + 1
    if whole < len(body):
        os.truncate(journal, whole)


def completed_trials(study: optuna.Study) -> int:
    """Return how many trials are complete."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The Gaussian process works on matrices of a few dozen rows: threads only slow it down and make it less repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_trial(study: optuna.Study, bench: TrialBench, config: SearchConfig) -> FrozenTrial:
    """Ask for a point, measure it, tell the study; a diverged model makes a failed trial.

    Raises:
        BudgetError: the ratio can't be met at any point.
    """
    with _one_thread():
        trial = study.ask(bench.space.distributions())
    began = time.perf_counter()
    allocation = bench.space.allocation(trial.params, trial.user_attrs.get("label", "sampled"))
    trial.set_user_attr("ranks", json.dumps(dict(allocation.ranks)))
    trial.set_user_attr("compression_ratio", allocation.compression_ratio)
    for name, excess in bench.space.constraints(allocation).items():
        trial.set_constraint(name, excess)
    try:
        with swapped(bench.handle, low_rank_layers(bench.handle, bench.decomposed.bases, allocation.ranks, storage="factored")):
            scores, _ = score_windows(bench.handle, bench.windows, batch_size=bench.batch_size, dense=bench.dense)
        value = objective_value(config.objective, scores, bench.windows.predicted_tokens)
        assert scores.kl is not None
        measured = {"kl": float(scores.kl.mean()), "perplexity": objective_value("perplexity", scores, 0)}
    except NumericalError as error:
        trial.set_user_attr("error", str(error))
        return study.tell(trial, state=TrialState.FAIL)
    measured |= {"tokens": bench.windows.predicted_tokens, "seconds": time.perf_counter() - began}
    for name, figure in measured.items():
        trial.set_user_attr(name, figure)
    return study.tell(trial, value)

"""The Optuna study of a run: created or reopened, baselines first, one trial at a time."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning, TrialPruned
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from lowrank_core.allocation import RankAllocation, Ranks, allocation_from_ranks, current_name
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.config import SearchConfig
from lowrank_core.errors import NumericalError, RunError
from lowrank_core.evaluation import DenseReference, WindowScores, score_windows
from lowrank_core.models.handle import ModelHandle
from lowrank_core.parameters import budget_for_ratio
from lowrank_core.runs import Run, process_started
from lowrank_core.search.objective import objective_value
from lowrank_core.search.samplers import ERROR, ESTIMATE, GIVEN, PointSampler
from lowrank_core.search.selection import Selection
from lowrank_core.studies.gain import flat_after
from lowrank_core.studies.numbering import RETRY_OF
from lowrank_core.studies.published import RULES
from lowrank_core.studies.records import MANUAL, records_of
from lowrank_core.studies.space import SearchSpace
from lowrank_core.studies.storage import open_storage
from lowrank_core.text.windows import WindowSet

__all__ = [
    "TrialBench",
    "check_rules",
    "completed_trials",
    "enqueue_allocation",
    "equip",
    "open_study",
    "requeue_lost",
    "run_trial",
    "running_trials",
    "study_in_memory",
    "trials_left",
    "waiting_trials",
]

_SIGNIFICANCE = 0.05
_MIN_WINDOWS = 6
"""Of a trial before it may be stopped: fewer pairs can't reach the significance in a signed-rank test."""
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_UNKNOWN_SECONDS = 60.0
_MAX_RETRIES = 3
_MAX_NATS = 500.0  # by which an estimate of the perplexity may lie above the best: math.exp takes no more than 709
_RULES = "rules"
"""User attribute of a study: ``published.RULES`` as its trials were measured."""


@dataclass(frozen=True)
class TrialBench:
    """Shared state of trials, computed once.

    Attributes:
        decomposed: the dense model, in which a trial swaps layers and puts them back, and the nested factors of its units.
        windows: search-validation windows, never the test ones.
        dense: the dense model's log-probabilities on them.
        space: variables and budget.
        batch_size: windows in a forward pass.
        selection: how ``windows`` were selected, in a search as published.
    """

    decomposed: Decomposed
    windows: WindowSet
    dense: DenseReference
    space: SearchSpace
    batch_size: int
    selection: Selection | None = None

    @property
    def handle(self) -> ModelHandle:
        return self.decomposed.handle


def open_study(run: Run, config: SearchConfig, space: SearchSpace) -> optuna.Study:
    """Return the run's study with its baselines queued, and the interrupted trials of a dead worker queued again.

    Raises:
        ConfigError: the database that holds it can't be reached.
        RunError: the run directory can't be written to.
    """
    lower, higher = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
    directions = [lower] if config.max_ratio is None else [higher, lower]
    storage = open_storage(run)
    study = optuna.create_study(storage=storage, study_name=run.study_name, directions=directions, load_if_exists=True)
    if not study.get_trials(deepcopy=False):
        study.set_user_attr(_RULES, RULES)
    equip(study, config, space)
    requeue_lost(run, study)
    if _has_these_rules(study, config):
        _enqueue_baselines(study, config, space)
    return study


def _has_these_rules(study: optuna.Study, config: SearchConfig) -> bool:
    return (config.projected and config.objective != "bolaco") or study.user_attrs.get(_RULES) == RULES


def check_rules(study: optuna.Study, config: SearchConfig) -> None:
    """Refuse to mix trials of different versions of the objective ``bolaco`` or the published search.

    Raises:
        RunError: the trials of ``study`` were measured by other rules.
    """
    if not _has_these_rules(study, config):
        raise RunError(
            "this run's trials follow an earlier version's reading of Bolaco, and new ones can't be compared with them. "
            "Export from it what you want to keep, and start a new search."
        )


def study_in_memory(config: SearchConfig, space: SearchSpace, *, baselines: bool = True) -> optuna.Study:
    """Return an in-memory study with one objective, optionally with its baselines queued."""
    study = optuna.create_study(direction=StudyDirection.MINIMIZE)
    study.set_user_attr(_RULES, RULES)
    equip(study, config, space)
    if baselines:
        _enqueue_baselines(study, config, space)
    return study


def equip(study: optuna.Study, config: SearchConfig, space: SearchSpace) -> None:
    """Set the sampler and the pruner of ``study`` from ``config``."""
    study.sampler = PointSampler(config, space.distributions(), space.scheme)
    study.pruner = _pruner(config)


def _pruner(config: SearchConfig) -> BasePruner:
    if config.pruner == "none":
        return NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return WilcoxonPruner(p_threshold=_SIGNIFICANCE, n_startup_steps=_MIN_WINDOWS)


def _enqueue_baselines(study: optuna.Study, config: SearchConfig, space: SearchSpace) -> None:
    present = {current_name(t.user_attrs.get("baseline", "")) for t in study.get_trials(deepcopy=False) if not _was_lost(t)}
    for baseline in (*space.baselines(), *space.first_points(config)):
        if baseline.key in present:
            continue
        attributes = {"label": baseline.label, "baseline": baseline.key}
        if baseline.ranks is None:
            study.enqueue_trial(dict(baseline.point), user_attrs=attributes)
        else:
            enqueue_allocation(study, baseline.ranks, **attributes)


def enqueue_allocation(study: optuna.Study, ranks: Ranks, *, label: str = MANUAL, **attributes: str) -> None:
    """Queue an allocation for the next free worker."""
    given = {"label": label, GIVEN: True, "ranks": json.dumps(dict(ranks)), **attributes}
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=given))


def _was_lost(trial: FrozenTrial) -> bool:
    """Return whether a trial lost its worker."""
    return trial.state == TrialState.FAIL and ERROR not in trial.user_attrs


def requeue_lost(run: Run, study: optuna.Study) -> None:
    """Fail the trials of dead workers, and queue them again, up to three times.

    A study in a database tells by heartbeats who is (``studies.storage``), one in a journal by the processes of this machine.
    """
    if run.storage_url is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        return
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    others = bool(run.further_workers())
    for trial in trials:
        if trial.state == TrialState.RUNNING and not _has_worker(trial, others):
            study.tell(trial.number, state=TrialState.FAIL)
        elif not _was_lost(trial):
            continue
        retries = trial.user_attrs.get("retries", 0)
        if trial.number not in again and retries < _MAX_RETRIES:
            _add_again(study, trial, retries + 1)


def _add_again(study: optuna.Study, trial: FrozenTrial, retries: int) -> None:
    kept = {name: value for name, value in trial.user_attrs.items() if name in ("label", "baseline", "request", "name", GIVEN)}
    if trial.user_attrs.get(GIVEN):
        kept["ranks"] = trial.user_attrs["ranks"]
    attributes = {**kept, RETRY_OF: trial.number, "retries": retries}
    drawn = {name: value for name, value in trial.system_attrs.items() if name.startswith("cma:")}  # which generation it is of
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    system = {**drawn, "fixed_params": dict(params)}
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes, system_attrs=system))


def _has_worker(trial: FrozenTrial, others: bool) -> bool:
    """Return whether the worker of a running trial lives; before it has said its name, it may be one of ``others``."""
    host, _, process = trial.user_attrs.get("worker", "").partition(":")
    if not host:
        age = time.time() - (trial.datetime_start.timestamp() if trial.datetime_start else 0.0)
        return others and age < _UNKNOWN_SECONDS
    if host != socket.gethostname():
        return True
    pid, _, started = process.partition(":")
    result = process_started(int(pid))
    return result is not None and abs(result - float(started)) < 1


def _me() -> str:
    pid = os.getpid()
    return f"{socket.gethostname()}:{pid}:{process_started(pid)}"


def _counted(study: optuna.Study, states: Sequence[TrialState]) -> int:
    return sum(trial.user_attrs.get("label") != MANUAL for trial in study.get_trials(deepcopy=False, states=tuple(states)))


def completed_trials(study: optuna.Study) -> int:
    """Return the number of complete or pruned trials, without manual ones."""
    return _counted(study, _FINISHED)


def trials_left(study: optuna.Study, config: SearchConfig) -> int:
    """Return how many trials the search still wants, those that run included; none once it is flat, where it stops then."""
    if config.stop_when_flat and flat_after(records_of(study), config) is not None:
        return 0
    return max(0, config.trials - completed_trials(study))


def running_trials(study: optuna.Study) -> int:
    """Return the number of running trials, without manual ones."""
    return _counted(study, (TrialState.RUNNING,))


def waiting_trials(study: optuna.Study) -> int:
    """Return the number of queued trials beyond the search's own: manual ones, and those that lost their worker."""

    def owed(trial: FrozenTrial) -> bool:
        return trial.user_attrs.get("label") == MANUAL or RETRY_OF in trial.user_attrs or "retry_history" in trial.system_attrs

    return sum(owed(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def run_trial(study: optuna.Study, bench: TrialBench, config: SearchConfig) -> FrozenTrial:
    """Measure the next queued or sampled trial. A diverged model gives a failed trial.

    Raises:
        BudgetError: the ratio can't be met at any point.
        RunError: as ``check_rules``.
    """
    check_rules(study, config)
    numbers: list[int] = []

    def measure(trial: Trial) -> float | tuple[float, float]:
        numbers.append(trial.number)
        return _Measurement(trial, bench, config).run()

    study.optimize(measure, n_trials=1, catch=(NumericalError,))  # one at a time: heartbeats come with it
    return next(trial for trial in study.get_trials(deepcopy=False) if trial.number == numbers[0])


class _Measurement:
    """One trial."""

    def __init__(self, trial: Trial, bench: TrialBench, config: SearchConfig) -> None:
        self._trial, self._bench, self._config = trial, bench, config
        self._label = current_name(trial.user_attrs.get("label", "sampled"))
        self._losses: list[float] = []

    def run(self) -> float | tuple[float, float]:
        trial, bench, config = self._trial, self._bench, self._config
        trial.set_user_attr("worker", _me())
        began = time.perf_counter()
        allocation = self._allocation()
        self._note({"ranks": json.dumps(dict(allocation.ranks)), "compression_ratio": allocation.compression_ratio})
        for name, excess in self._constraints(allocation).items():
            trial.set_constraint(name, excess)
        try:
            with bench.decomposed.swapped(allocation.ranks):
                scores, _ = score_windows(
                    bench.handle,
                    bench.windows,
                    batch_size=bench.batch_size,
                    dense=bench.dense,
                    on_batch=self._report,
                    autocast=config.autocast,
                )
            value = objective_value(config.objective, scores, bench.windows.context)
            assert scores.kl is not None
            measured = {"kl": float(scores.kl.mean()), "perplexity": objective_value("perplexity", scores, bench.windows.context)}
        except NumericalError as error:
            trial.set_user_attr(ERROR, str(error))
            raise
        finally:
            self._note({"tokens": len(self._losses) * (bench.windows.context - 1), "seconds": time.perf_counter() - began})
        self._note(measured)
        return value if config.max_ratio is None else (allocation.compression_ratio, value)

    def _note(self, attributes: Mapping[str, object]) -> None:
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)

    def _allocation(self) -> RankAllocation:
        trial, space = self._trial, self._bench.space
        if trial.user_attrs.get(GIVEN):
            return allocation_from_ranks(self._label, space.units, json.loads(trial.user_attrs["ranks"]))
        for name, bounds in space.distributions().items():
            trial.suggest_float(name, bounds.low, bounds.high, log=bounds.log)
        return space.allocation(trial.params, self._label)

    def _constraints(self, allocation: RankAllocation) -> dict[str, float]:
        """Return the violation of the budget; a manual allocation over it can't become the best."""
        if self._label != MANUAL or self._config.max_ratio is not None:
            return {}
        budget = budget_for_ratio(self._bench.space.units, self._config.compression_ratio)
        return {"keeps too much": max(0, allocation.parameters - budget) / allocation.dense_parameters}

    def _report(self, scores: WindowScores) -> None:
        """Report the loss of every window of a batch to the study, and prune if it can't become the best."""
        losses = scores.kl if self._config.objective == "kl" else scores.nll
        assert losses is not None
        single = self._config.max_ratio is None
        for loss in losses.tolist():
            if single:  # Optuna takes no intermediate values of two objectives
                self._trial.report(loss, len(self._losses))
            self._losses.append(loss)
        sampled = self._label == "sampled" and len(self._losses) < self._bench.windows.windows
        if single and sampled and self._trial.should_prune():
            self._trial.set_user_attr(ESTIMATE, self._estimate())
            raise TrialPruned

    def _estimate(self) -> float:
        """Return the estimated value of a pruned trial: the best one's, shifted by the difference on common windows."""
        best = self._trial.study.best_trial
        worse = sum(loss - best.intermediate_values[window] for window, loss in enumerate(self._losses)) / len(self._losses)
        assert best.value is not None
        return best.value + worse if self._config.objective == "kl" else best.value * math.exp(min(worse, _MAX_NATS))

"""State of a worker for its requests, and lookup of the requested allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import optuna

from lowrank_core.allocation import ALLOCATORS, RankAllocation, Ranks, allocation_from_ranks
from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import SearchConfig
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation import EvaluationReport, evaluate
from lowrank_core.models import ModelHandle
from lowrank_core.runs import Run
from lowrank_core.search.study import TrialBench
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.studies.records import TrialRecord, best_trial, pareto_front, read_trials
from lowrank_core.text import WindowSet
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.sensitivity import SensitivityBench
from lowrank_core.worker.session import RunContext

__all__ = ["WorkerContext", "LastBuilt", "EvaluationCache", "chosen_allocation", "chosen_model", "complete_trial"]


class LastBuilt:
    """Cache of the last built model, for consecutive requests; at most one."""

    def __init__(self) -> None:
        self._key: object = None
        self._held: object = None

    def take(self, key: object, build: Callable[[], object]) -> object:
        """Return the value of ``key``, else build and cache it."""
        if self._held is None or key != self._key:
            self.clear()  # before another one is built: two would not fit where one does
            self._held = build()
            self._key = key
        return self._held

    def clear(self) -> None:
        self._key = self._held = None


class EvaluationCache:
    """Cache of test measurements of the search's own factors, by ranks.

    All else that a figure depends on is the session's: the model, the factors, the windows, and how many of them are in a pass.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[tuple[str, int | None], ...], EvaluationReport] = {}

    def keep(self, ranks: Ranks, report: EvaluationReport) -> EvaluationReport:
        """Store ``report`` for ``ranks``, and return it."""
        self._found[tuple(sorted(ranks.items()))] = report
        return report

    def of(self, ranks: Ranks) -> EvaluationReport | None:
        """Return the measurement of ``ranks``; None without one."""
        return self._found.get(tuple(sorted(ranks.items())))


@dataclass(frozen=True)
class WorkerContext:
    """The run and its loaded state; ``bench`` and ``study`` are None for an analysis."""

    run: Run
    session: RunContext
    reporter: Reporter
    bench: TrialBench | None = None
    study: optuna.Study | None = None
    last_built: LastBuilt = field(default_factory=LastBuilt, compare=False)
    evaluations: EvaluationCache = field(default_factory=EvaluationCache, compare=False)
    sensitivity: SensitivityBench = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sensitivity", SensitivityBench(self.run, self.session, self.reporter, self.bench))

    def measured(self, handle: ModelHandle, windows: WindowSet, stage: str) -> EvaluationReport:
        """Measure a model on ``windows``, next to the dense model."""
        bench, _, _ = self.search
        with self.reporter.stage(stage, windows.windows) as progress:
            return evaluate(handle, windows, against=self.session.handle, batch_size=bench.batch_size, progress=progress)

    @property
    def search(self) -> tuple[TrialBench, optuna.Study, SearchConfig]:
        """Return the search's bench and study.

        Raises:
            ConfigError: nothing is searched.
        """
        config = self.run.config.search
        if self.bench is None or self.study is None or config is None:
            raise ConfigError("this run only analyses the model. Start a rank search first.")
        return self.bench, self.study, config


def complete_trial(run: Run, number: int | None) -> TrialRecord:
    """Return trial ``number``, or the best one.

    Raises:
        ConfigError: it is not complete.
    """
    trials = read_trials(run)
    search = run.config.search
    if number is None and search is not None and search.max_ratio is not None:
        front = ", ".join(str(trial.number) for trial in pareto_front(trials))
        raise ConfigError(
            f"a search over a range of ratios has no single best trial. Choose one of its Pareto front: {front or 'none yet'}."
        )
    if number is None:
        best = best_trial(trials)
        if best is None:
            raise ConfigError("no trial of this run is complete yet. Wait for one, or resume the search.")
        return best
    chosen = next((trial for trial in trials if trial.number == number), None)
    if chosen is None or chosen.state != "complete":
        raise ConfigError(
            f"trial {number} of this run is not complete; it has {sum(t.state == 'complete' for t in trials)} complete trials."
        )
    return chosen


def chosen_allocation(run: Run, bench: TrialBench, model: object) -> RankAllocation:
    """Return the allocation of the trial or the allocator that ``model`` refers to, as ``ModelRef.parse`` reads it.

    Raises:
        ConfigError: there is no such trial.
    """
    ref = ModelRef.parse(model)
    if not ref.searched:
        raise ConfigError(f"{ref} is no allocation of this run's search. Give a trial's number, `best` or one of {', '.join(ALLOCATORS)}.")
    if ref.kind == "allocator":
        return bench.space.by_allocator(ref.name, bench.space.compression_ratio, influence=bench.decomposed.statistics.influence)
    record = complete_trial(run, ref.number)
    config = run.config.search
    single = config is not None and config.max_ratio is None
    # Only a rule at the one ratio of the search is known by its name; a second manual trial would pass for the first.
    label = record.label if single and record.label in ALLOCATORS else f"trial {record.number}"
    return allocation_from_ranks(label, bench.space.units, record.ranks)


def chosen_model(run: Run, session: RunContext, bench: TrialBench, model: object) -> tuple[RankAllocation, CompressedModel]:
    """Return the allocation as ``chosen_allocation`` does, and the model compressed so.

    Raises:
        ConfigError: there is no such trial.
    """
    allocation = chosen_allocation(run, bench, model)
    return allocation, bench.decomposed.compress(allocation, session.windows.calibration)

"""The worker: one process that prepares a run, runs trials and handles requests. It may be killed at any moment.

Further workers, on this machine or on others, join it for the trials alone (``worker.joining``).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import optuna
from filelock import FileLock, Timeout

from lowrank_core.config import SearchConfig, to_mapping
from lowrank_core.config.mapping import build
from lowrank_core.errors import Cancelled, LowRankError, NumericalError, RunError
from lowrank_core.runs import Run, client, write_json
from lowrank_core.search.samplers import phase
from lowrank_core.search.selection import Selection
from lowrank_core.search.study import (
    TrialBench,
    completed_trials,
    equip,
    open_study,
    requeue_lost,
    run_trial,
    running_trials,
    trials_left,
    waiting_trials,
)
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.studies.gain import flat_words
from lowrank_core.studies.records import records_of
from lowrank_core.worker.background import answer_in_background
from lowrank_core.worker.context import WorkerContext
from lowrank_core.worker.handlers import answer_requests, confirm
from lowrank_core.worker.identity import RunIdentity, signed_in
from lowrank_core.worker.reporter import IDLE, Reporter
from lowrank_core.worker.sensitivity import SensitivityBench, SensitivityOutcome
from lowrank_core.worker.session import RunContext, fingerprint, prepare, record_curves, search_bench

__all__ = ["TrialRunner", "measure_alone", "run_worker"]

_POLL_SECONDS = 0.3
_MAX_FAILURES = 5
"""Failed trials in a row after which the search gives up: the model diverges everywhere."""


@contextmanager
def _sole_worker(run: Run) -> Iterator[None]:
    lock = FileLock(run.path / "worker.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"another worker holds {run.path}. Stop it first, help it with `lowrank worker --run {run.path} --join`, "
            "or start a second search in a folder of its own."
        ) from error
    except OSError as error:
        raise RunError(f"can't write in {run.path}: {error.strerror}. Give a folder that you can write to.") from error
    try:
        yield
    finally:
        lock.release()  # the system releases it too, if this process is killed


def run_worker(run: Run, *, warm_seconds: float = 0.0, verbose: bool = True, helpers: int = 0) -> tuple[RunContext, TrialBench | None]:
    """Finish the work of ``run``, then handle requests until ``warm_seconds`` pass without one.

    ``helpers`` further processes on this machine take trials, too; they end with the search.

    Returns what it holds, for a caller in the same process. A stop by the user is not an error: the state tells.
    ``verbose`` writes a line for each stage to stderr: the log of a detached worker.

    Raises:
        LowRankError: the run is a recorded one, or it failed; its status says why.
        Cancelled: stopped before there was anything to return.
    """
    run.refuse_if_recorded()
    with _sole_worker(run), _reporting(run, Reporter(run, verbose=verbose)) as reporter:
        session = prepare(run, reporter)
        search = run.config.search
        if search is None:
            _serve(WorkerContext(run, session, reporter), warm_seconds)
            reporter.close("finished")
            return session, None
        body = run.part("selection")
        known = None if body is None else build(Selection, body, "selection.json")
        bench = search_bench(session, search, reporter, selection=known)
        RunIdentity.of(run).keep(result := fingerprint(session, bench))
        if bench.selection is not None:
            write_json(run.path / "selection.json", to_mapping(bench.selection))
        record_curves(run, search, bench)
        study = open_study(run, search, bench.space)
        _sign(run, study, bench, result)
        for _ in range(helpers):
            client.add_worker(run, warm_seconds=0.0)
        complete = _search(WorkerContext(run, session, reporter, bench, study), warm_seconds)
        reporter.close("finished" if complete else "stopped", flat_words(records_of(study), run.config.search or search))
        return session, bench


def measure_alone(run: Run, config: SensitivityConfig, *, verbose: bool = True) -> SensitivityOutcome:
    """Measure sensitivities without running trials; the run's state is restored afterwards.

    Raises:
        LowRankError: as ``run_worker`` and ``SensitivityBench.measure``.
        Cancelled: the user asked to stop; measured cells are kept.
    """
    run.refuse_if_recorded()
    with _sole_worker(run):
        before = run.status()
        reporter = Reporter(run, verbose=verbose)
        with _reporting(run, reporter):
            session = prepare(run, reporter)
        reporter.forget_plan()
        try:
            return SensitivityBench(run, session, reporter).measure(config)
        finally:
            unchanged = not before.active and before.state != "new"
            reporter.close(before.state if unchanged else "finished", before.message)


@contextmanager
def _reporting(run: Run, reporter: Reporter) -> Iterator[Reporter]:
    """Yield ``reporter``; on failure, its final status has the error."""
    try:
        yield reporter
    except (Cancelled, KeyboardInterrupt):
        reporter.close("stopped", "Stopped. Resume to go on; finished stages and trials are kept.")
        raise
    except LowRankError as error:
        reporter.close("failed", str(error))
        raise
    except OSError as error:
        failure = RunError(f"can't write in {run.path}: {error.strerror or error}. Free some space, then resume: what is complete is kept.")
        reporter.close("failed", str(failure))
        raise failure from error
    except BaseException as error:
        reporter.close("failed", f"{type(error).__name__}: {error}. The log has the details.")
        raise


def _sign(run: Run, study: optuna.Study, bench: TrialBench, result: Mapping[str, object]) -> None:
    """Store in the study what further workers need to join, and to check that they may."""
    study.set_user_attr("run", json.dumps(to_mapping(run.config)))
    study.set_user_attr("fingerprint", json.dumps({**result, **signed_in(study)}))
    if bench.selection is not None:
        study.set_user_attr("selection", json.dumps(to_mapping(bench.selection)))


class _Orders:
    """The user's current settings: the search's config, and its copy in the study for further workers."""

    def __init__(self, worker: WorkerContext) -> None:
        self._desk = worker
        self._published: tuple[SearchConfig, bool] | None = None

    def read(self) -> SearchConfig:
        """Return the current search config; the study's sampler and pruner follow it."""
        bench, study, config = self._desk.search
        now = config, self._desk.reporter.paused
        if now != self._published:
            equip(study, config, bench.space)
            study.set_user_attr("search", json.dumps(to_mapping(config)))
            study.set_user_attr("paused", now[1])
            self._published = now
        return config


def _search(worker: WorkerContext, warm_seconds: float) -> bool:
    """Run trials until all are complete or stopped, handling requests in between; return whether all are complete."""
    _, study, _ = worker.search
    orders = _Orders(worker)
    while True:
        if trials_left(study, orders.read()) and not worker.reporter.paused:
            worker.reporter.say(message="")
            _run_trials(worker, orders)
        complete = not trials_left(study, orders.read())
        if complete:
            worker.reporter.say(message=flat_words(records_of(study), orders.read()))
            confirm(worker)
        if not _serve(worker, warm_seconds, orders):
            return complete


class TrialRunner:
    """Trials in this process, one after the other."""

    def __init__(self, study: optuna.Study, bench: TrialBench) -> None:
        self._study, self._bench, self._failures = study, bench, 0
        self.seconds: list[float] = []

    def run(self, config: SearchConfig) -> None:
        """Measure the next trial, and log it.

        Raises:
            NumericalError: it was one failure in a row too many.
        """
        began = time.perf_counter()
        trial = run_trial(self._study, self._bench, config)
        self.seconds.append(time.perf_counter() - began)
        _log_trial(self._study, trial)
        self._failures = self._failures + 1 if trial.state == optuna.trial.TrialState.FAIL else 0
        if self._failures == _MAX_FAILURES:
            reason = trial.user_attrs.get("error", "")
            raise NumericalError(f"{self._failures} trials in a row failed. {reason} Lower the compression ratio.")

    def remaining(self, trials: int, *, workers: int) -> float | None:
        """Return the seconds that ``trials`` take ``workers``, by the trials so far; None before the first."""
        return _remaining(self.seconds, trials, workers=workers)


def _run_trials(worker: WorkerContext, orders: _Orders) -> None:
    bench, study, _ = worker.search
    runner = TrialRunner(study, bench)
    while not worker.reporter.paused:
        done, config = completed_trials(study), orders.read()
        left, running = trials_left(study, config), running_trials(study)
        if not left and not running:
            return
        answer_requests(worker)
        requeue_lost(worker.run, study)
        helpers = len(worker.run.further_workers())
        eta = runner.remaining(left, workers=1 + helpers)
        worker.reporter.search(f"Searching ({phase(config, done)})", done, config.trials, eta)
        if left <= running and not waiting_trials(study):
            time.sleep(_POLL_SECONDS)  # the last ones are with other workers
            continue
        runner.run(config)
        worker.reporter.searched(len(runner.seconds), sum(runner.seconds))


def _remaining(seconds: Sequence[float], trials: int, *, workers: int) -> float | None:
    """Return the seconds that ``trials`` take ``workers``, by the trials of this session; None before the first."""
    return sum(seconds) / len(seconds) * max(0, trials) / workers if seconds else None


def _log_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Write a line for a finished trial to stderr."""
    complete = trial.state == optuna.trial.TrialState.COMPLETE
    result = " ".join(f"{value:.6g}" for value in trial.values) if complete else trial.state.name.lower()
    best = ""
    if len(study.directions) == 1:
        others = [t for t in study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
        feasible = [other.value for other in others if other.value is not None and all(e <= 0 for e in other.constraints.values())]
        best = f", best {min(feasible):.6g}" if feasible else ""
    print(f"trial {trial.number} ({trial.user_attrs.get('label', 'sampled')}): {result}{best}", file=sys.stderr, flush=True)


def _serve(worker: WorkerContext, warm_seconds: float, orders: _Orders | None = None) -> bool:
    """Handle requests until none arrives for ``warm_seconds``; return True as soon as there are trials to run."""
    reporter = worker.reporter
    reporter.serve()
    last = time.monotonic()
    reported: bool | None = None
    while True:
        wanted = orders is not None and worker.study is not None and trials_left(worker.study, orders.read()) > 0
        if wanted and not reporter.paused:
            return True
        if reported != wanted:
            reported = wanted
            reporter.say(state="stopped" if wanted else "idle", **IDLE)
        results_of = answer_requests(worker)
        if _measure_waiting(worker) or results_of or answer_in_background(worker):
            last, reported = time.monotonic(), None
            continue
        if (reporter.paused and not wanted) or time.monotonic() - last > warm_seconds:
            return False
        time.sleep(_POLL_SECONDS)


def _measure_waiting(worker: WorkerContext) -> bool:
    """Measure queued manual allocations, even if the search is stopped or done; return whether there was one."""
    if worker.study is None or not waiting_trials(worker.study):
        return False
    bench, study, config = worker.search
    worker.reporter.say(state="running", **{**IDLE, "stage": "Measuring a manual allocation"})
    _log_trial(study, run_trial(study, bench, config))
    return True

"""The worker: one process that prepares a run, runs its trials and answers requests, and can be killed at any moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from filelock import FileLock, Timeout

from lowrank_core.config import SearchConfig
from lowrank_core.errors import Cancelled, LowRankError, NumericalError, RunError
from lowrank_core.runs import Run
from lowrank_core.search.reporter import Reporter
from lowrank_core.search.requests import answer_requests
from lowrank_core.search.session import Session, prepare, search_bench
from lowrank_core.search.study import TrialBench, completed_trials, open_study, run_trial

__all__ = ["run_worker"]

_POLL_SECONDS = 0.3
_MOST_FAILURES = 5
"""Failed trials in a row after which the search gives up: the model diverges everywhere."""


@contextmanager
def _sole_worker(run: Run) -> Iterator[None]:
    lock = FileLock(run.path / "worker.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another worker holds {run.path}. Stop it first, or start a second search in a folder of its own.") from error
    except OSError as error:
        raise RunError(f"can't write in {run.path}: {error.strerror}. Give a folder that you can write to.") from error
    try:
        yield
    finally:
        lock.release()  # the system releases it too, if this process is killed


def run_worker(run: Run, *, warm_seconds: float = 0.0, verbose: bool = True) -> tuple[Session, TrialBench | None]:
    """Do everything that is left to do in ``run``, then answer requests for ``warm_seconds`` without one.

    Returns what it holds, for a caller in the same process. A stop by the user is not an error: the state tells.
    ``verbose`` writes a line for each stage to stderr: the log of a detached worker.

    Raises:
        LowRankError: the run is a recorded one, or it failed; its status says why.
        Cancelled: stopped before there was anything to return.
    """
    run.refuse_if_recorded()
    with _sole_worker(run):
        reporter = Reporter(run, verbose=verbose)
        try:
            session = prepare(run, reporter)
            search = run.config.search
            if search is None:
                _serve(run, session, None, reporter, warm_seconds)
                reporter.close("finished")
                return session, None
            bench = search_bench(session, search, run.config.calibration.batch_size, reporter)
            complete = _search(run, session, bench, search, reporter, warm_seconds)
            reporter.close("finished" if complete else "stopped")
            return session, bench
        except (Cancelled, KeyboardInterrupt):
            reporter.close("stopped", "Stopped. Resume to go on; finished stages and trials are kept.")
            raise
        except LowRankError as error:
            reporter.close("failed", str(error))
            raise
        except BaseException as error:
            reporter.close("failed", f"{type(error).__name__}: {error}. The log has the details.")
            raise


def _search(run: Run, session: Session, bench: TrialBench, config: SearchConfig, reporter: Reporter, warm_seconds: float) -> bool:
    """Run trials until all are complete or the user stops; between trials, answer requests. Return whether all are complete."""
    study = open_study(run, config, bench.space)
    while True:
        if completed_trials(study) < config.trials and not reporter.paused:
            _run_trials(run, session, bench, config, reporter, study)
        complete = completed_trials(study) >= config.trials
        if not _serve(run, session, bench, reporter, warm_seconds, until_resumed=not complete):
            return complete


def _run_trials(run: Run, session: Session, bench: TrialBench, config: SearchConfig, reporter: Reporter, study: optuna.Study) -> None:
    failures = 0
    seconds: list[float] = []
    while (done := completed_trials(study)) < config.trials and not reporter.paused:
        answer_requests(run, session, bench, reporter)
        eta = sum(seconds) / len(seconds) * (config.trials - done) if seconds else None
        reporter.say(state="running", stage="Searching", done=done, total=config.trials, eta_seconds=eta)
        began = time.perf_counter()
        trial = run_trial(study, bench, config)
        seconds.append(time.perf_counter() - began)
        _log_trial(study, trial)
        failures = failures + 1 if trial.state == optuna.trial.TrialState.FAIL else 0
        if failures == _MOST_FAILURES:
            raise NumericalError(f"{failures} trials in a row failed. {trial.user_attrs.get('error', '')} Lower the compression ratio.")


def _log_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    found = "failed" if trial.value is None else f"{trial.value:.6g}"
    feasible = [
        other.value
        for other in study.get_trials(deepcopy=False)
        if other.value is not None and all(excess <= 0 for excess in other.constraints.values())
    ]
    best = f", best {min(feasible):.6g}" if feasible else ""
    print(f"trial {trial.number} ({trial.user_attrs.get('label', 'sampled')}): {found}{best}", file=sys.stderr, flush=True)


def _serve(
    run: Run, session: Session, bench: TrialBench | None, reporter: Reporter, warm_seconds: float, *, until_resumed: bool = False
) -> bool:
    """Answer requests until none has come for ``warm_seconds``; return True as soon as a paused search is resumed."""
    state = "stopped" if until_resumed else "idle"
    last = time.monotonic()
    reporter.serve()
    reporter.say(state=state, stage="", done=0, total=0, eta_seconds=None)
    while True:
        if answer_requests(run, session, bench, reporter):
            last = time.monotonic()
            reporter.say(state=state, stage="", done=0, total=0, eta_seconds=None)
        if until_resumed and not reporter.paused:
            return True
        stopped = reporter.paused and not until_resumed
        if stopped or time.monotonic() - last > warm_seconds:
            return False
        time.sleep(_POLL_SECONDS)

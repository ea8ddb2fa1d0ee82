"""Status of a worker: stage, progress, ETA, heartbeat; and stop requests."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_core.errors import Cancelled
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import Run, RunStatus, process_started
from lowrank_core.runs.stage_times import TimeEstimate, estimated, remember, stages_of, work_of
from lowrank_core.types import Progress
from lowrank_core.worker.pace import FinishedStage, LogLines, StageClock

__all__ = ["IDLE", "Reporter"]

_WRITE_SECONDS = 0.5  # progress is written at most this often
_HEARTBEAT_SECONDS = 2.0
IDLE = {"stage": "", "done": 0, "total": 0, "eta_seconds": None, "all_left_seconds": None, "stage_number": 0, "stages": 0}
"""Fields of a status between stages."""


class Reporter:
    """Writes the status of one worker, from its work and from a heartbeat thread.

    The one that ``leads`` writes the run's status; another a file of its own among the run's workers, gone when it ends.
    """

    def __init__(self, run: Run, *, verbose: bool = True, leads: bool = True) -> None:
        self._run = run
        self._own = None if leads else run.workers_folder / f"{os.getpid()}.json"
        self._verbose = verbose
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._timings: dict[str, float] = {}
        self._clock, self._work = StageClock(), dict[str, float]()
        self._clock.plan = estimated(run.config.model, {}, stages_of(run.config))
        self._request: Path | None = None
        self._earlier = run.stop_asked()  # started only to answer requests: the old stop is not for us
        pid = os.getpid()
        self._status = RunStatus(state="running", stage="Starting", pid=pid, pid_started=process_started(pid))
        self._written = 0.0
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        log = LogLines(self._clock)
        while not self._done.wait(_HEARTBEAT_SECONDS):
            self._write()
            if self._status.state == "running":
                log.tick()

    def _write(self) -> None:
        with self._lock:
            self._run.write_status(replace(self._status, timings=dict(self._timings), earlier_stop=self._earlier), self._own)
            self._written = time.monotonic()

    def say(self, **changes: object) -> None:
        """Change fields of the status, and write it."""
        with self._lock:
            self._status = replace(self._status, **changes)  # type: ignore[arg-type]
        self._write()

    @property
    def paused(self) -> bool:
        """Whether trials are paused."""
        return self._run.pause_marker.exists()

    def serve(self) -> None:
        """Handle requests only from now on: a standing stop does not apply to them."""
        self._earlier = self._run.stop_asked()

    def respect(self, request: Path | None) -> None:
        """Work for ``request`` from now on, and stop if it is cancelled."""
        self._request = request

    @property
    def request(self) -> str:
        """Id of the current request; empty without one."""
        return "" if self._request is None else self._request.stem

    @property
    def cancelled(self) -> bool:
        """Whether the current request is cancelled."""
        return self._request is not None and not self._request.exists()

    def check_stop(self) -> None:
        """Raise ``Cancelled`` if a stop was requested since this worker started, or the current request was cancelled."""
        if self.cancelled:
            raise Cancelled
        asked = self._run.stop_asked()
        if asked is None:
            self._earlier = None
        elif asked != self._earlier:
            raise Cancelled

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Progress]:
        """Announce a stage and yield its progress callback; its time is recorded, and a line goes to the log of a detached worker."""
        self.check_stop()
        clock = self._clock
        clock.begin(name, total)
        self.say(state="running", stage=name, **self._progress())
        if self._verbose:
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)

        def progress(done: int, total: int) -> None:
            self.check_stop()
            clock.step(done, total)
            with self._lock:
                self._status = replace(self._status, **self._progress())
            if time.monotonic() - self._written > _WRITE_SECONDS:
                self._write()

        yield progress
        took = clock.end()
        self._timings[name] = took.seconds
        self._run.add_event("stage", name=name, seconds=took.seconds, cpu_seconds=took.cpu_seconds)
        self._remember(took)

    def plan(self, shapes: Sequence[MatrixShape], head: int, kept: Sequence[str]) -> None:
        """Estimate the stages of the run from the machine's record, now that its model and text are known; record those so far.

        Args:
            shapes, head: as ``runs.stage_times.work_of`` takes them.
            kept: stages whose results are on disk.
        """
        self._work = work_of(self._run.config, shapes, head)
        self._clock.plan = estimated(self._run.config.model, self._work, stages_of(self._run.config), kept=kept)
        for took in self._clock.finished:
            self._remember(took)

    def forget_plan(self) -> None:
        """Take what follows as no stages of the run: they have other windows and settings."""
        self._work, self._clock.plan = {}, TimeEstimate()

    def _remember(self, took: FinishedStage) -> None:
        if took.whole and self._request is None:
            remember(self._run.config.model, self._work, took.name, took.seconds)

    def search(self, stage: str, done: int, total: int, left: float | None) -> None:
        """Announce the trials of a search: ``done`` of ``total``, and the seconds that are left."""
        self._clock.begin(stage, total)
        self._clock.step(done, total, left)
        self.say(state="running", stage=stage, **self._progress())

    def searched(self, trials: int, seconds: float) -> None:
        """Add to the machine's record that this process took ``seconds`` for ``trials`` trials."""
        search = self._run.config.search
        if trials and search is not None:
            remember(self._run.config.model, self._work, "Searching", seconds * search.trials / trials)

    def _progress(self) -> dict[str, Any]:
        clock = self._clock
        number = clock.number if self._request is None else 0  # a request's stages are none of the run's
        left = {"eta_seconds": clock.steps_left, "all_left_seconds": clock.all_left if number else None}
        return {"done": clock.done, "total": clock.total, "stage_number": number, "stages": len(clock.plan.stages) if number else 0, **left}

    def close(self, state: str, message: str = "") -> None:
        """Write the final status."""
        self._done.set()
        self._thread.join()
        if self._own is not None:
            self._own.unlink(missing_ok=True)
            return
        self.say(state=state, message=message, **IDLE)
        self._run.add_event(state, message=message)

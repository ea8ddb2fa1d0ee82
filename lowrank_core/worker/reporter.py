"""Status of a worker: stage, progress, ETA, heartbeat; and stop requests."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lowrank_core.errors import Cancelled
from lowrank_core.runs import Run, RunStatus, process_started
from lowrank_core.types import Progress
from lowrank_core.worker.pace import Pace

__all__ = ["Reporter"]

_WRITE_SECONDS = 0.5  # progress is written at most this often
_HEARTBEAT_SECONDS = 2.0


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
        self._request: Path | None = None
        self._earlier = run.stop_asked()  # started only to answer requests: the old stop is not for us
        pid = os.getpid()
        self._status = RunStatus(state="running", stage="Starting", pid=pid, pid_started=process_started(pid))
        self._written = 0.0
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._done.wait(_HEARTBEAT_SECONDS):
            self._write()

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
        began, pace = time.perf_counter(), Pace()
        self.say(state="running", stage=name, done=0, total=total, eta_seconds=None)
        if self._verbose:
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)

        def progress(done: int, total: int) -> None:
            self.check_stop()
            eta = pace.remaining(done, total)
            with self._lock:
                self._status = replace(self._status, done=done, total=total, eta_seconds=eta)
            if time.monotonic() - self._written > _WRITE_SECONDS:
                self._write()

        yield progress
        self._timings[name] = time.perf_counter() - began
        self._run.add_event("stage", name=name, seconds=self._timings[name])

    def close(self, state: str, message: str = "") -> None:
        """Write the final status."""
        self._done.set()
        self._thread.join()
        if self._own is not None:
            self._own.unlink(missing_ok=True)
            return
        self.say(state=state, stage="", done=0, total=0, eta_seconds=None, message=message)
        self._run.add_event(state, message=message)

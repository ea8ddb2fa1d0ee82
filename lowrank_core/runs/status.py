"""Status of a worker and liveness of its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowrank_core.config.mapping import build
from lowrank_core.runs.files import JsonMapping

__all__ = ["ACTIVE_STATES", "RunStatus", "is_alive", "process_started", "status_from"]

ACTIVE_STATES = ("queued", "running", "stopping", "idle")


@dataclass(frozen=True)
class RunStatus:
    """Last status of the worker.

    Attributes:
        state: ``new``, ``queued``, ``running``, ``stopping``, ``stopped``, ``idle`` (done, still warm), ``finished``, ``failed``
            or ``interrupted`` (its process died).
        stage: what it does now, in words.
        done, total: progress within the stage; total 0 where it can't be reported.
        eta_seconds: estimate for the rest of the stage; None where there is none.
        stage_number, stages: place of the stage among those of the run, from 1 on; 0 where it is none of them.
        all_left_seconds: estimate for the rest of all stages; None where there is none.
        message: an error or a hint for the user.
        warnings: what the user should know of the results.
        dense_warnings: why comparisons with the dense model may say nothing.
        pid, pid_started: the process, and its start time as the system tells it (a pid alone may be reused).
        heartbeat: time of this record, seconds since the epoch.
        earlier_stop: the stop (``Run.stop_asked``) that stood before the current work began, and does not end it.
        timings: seconds that each finished stage took.
    """

    state: str = "new"
    stage: str = ""
    done: int = 0
    total: int = 0
    eta_seconds: float | None = None
    message: str = ""
    warnings: tuple[str, ...] = ()
    pid: int | None = None
    pid_started: float | None = None
    heartbeat: float = 0.0
    timings: Mapping[str, float] | None = None
    earlier_stop: int | None = None
    dense_warnings: tuple[str, ...] = ()
    stage_number: int = 0
    stages: int = 0
    all_left_seconds: float | None = None

    @property
    def active(self) -> bool:
        """Whether a worker holds the run."""
        return self.state in ACTIVE_STATES

    @property
    def fraction(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total else None


def process_started(pid: int) -> float | None:
    """Return the start time of process ``pid``; None if it is gone (or a zombie)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def status_from(body: JsonMapping, path: Path) -> RunStatus:
    """Return the status in the file ``path``.

    Raises:
        RunError: it is damaged.
    """
    return build(RunStatus, body, str(path), "Delete the file, or the run.")


def is_alive(status: RunStatus) -> bool:
    """Whether the process of ``status`` is alive."""
    started = None if status.pid is None else process_started(status.pid)
    return started is not None and status.pid_started is not None and abs(started - status.pid_started) < 1

"""Start, stop and query a worker from a process that never imports torch."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import threading
import time
from pathlib import Path
from typing import Protocol

import psutil

from lowrank_core.allocation import with_current_names
from lowrank_core.config import to_mapping
from lowrank_core.errors import RunError
from lowrank_core.runs import JsonMapping, Run, RunStatus, read_json, write_json
from lowrank_core.runs.processes import python_command, python_environment

__all__ = [
    "BACKGROUND",
    "Request",
    "add_worker",
    "results",
    "submit",
    "pending_requests",
    "request_path",
    "request_stop",
    "result_path",
    "start_worker",
    "terminate",
    "cancel",
]

BACKGROUND = ("sensitivity",)
"""Kinds of requests that wait for everything else, trials included, and yield for it at each step."""
WARM_SECONDS = 300
"""Seconds that an idle worker keeps its model loaded."""


class Request(Protocol):
    """A dataclass whose fields are what it asks; ``studies.requests`` has them all."""

    @property
    def kind(self) -> str: ...


def start_worker(run: Run) -> None:
    """Start a detached worker for ``run``, or resume the live one. Also resumes a stopped or interrupted run.

    The worker outlives the caller: closing the page or the dashboard stops nothing.

    Raises:
        RunError: the run is a recorded one, or the process can't be started.
    """
    run.refuse_if_recorded()
    run.pause_marker.unlink(missing_ok=True)
    _launch(run)


def add_worker(run: Run, *, warm_seconds: float = WARM_SECONDS) -> None:
    """Start another detached worker for trials of ``run``; it loads the model again.

    Raises:
        RunError: the run is a recorded one, nobody works on it, or the process can't be started.
    """
    run.refuse_if_recorded()
    if not run.worker_alive():
        raise RunError("nobody works on this run, so there is nothing to help with. Start or resume it first.")
    _spawn(run, warm_seconds, "--join")


def _launch(run: Run) -> None:
    if run.worker_alive():
        return
    run.write_status(RunStatus(state="queued", stage="Starting the worker"))
    _spawn(run, WARM_SECONDS, "--keep-paused")


def _spawn(run: Run, warm_seconds: float, *options: str) -> None:
    try:
        with (run.path / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                python_command("-m", "lowrank_core", "worker", "--run", str(run.path), "--warm", str(warm_seconds), *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=python_environment(PYTHONUNBUFFERED="1"),
                cwd=run.path,
            )
    except OSError as error:
        raise RunError(f"the worker could not be started: {error}.") from error
    threading.Thread(target=process.wait, daemon=True).start()  # reaps it when it ends; it does not end with us


def request_stop(run: Run) -> None:
    """Stop the worker after the current step; results stay, and the worker still handles requests."""
    run.pause_marker.touch()


def terminate(run: Run) -> None:
    """Kill all workers of the run on this machine; trials in flight are measured again on resume."""
    workers = [*run.further_workers().values(), *([run.status()] if run.worker_alive() else [])]
    for worker in workers:
        if worker.pid is not None:
            with contextlib.suppress(psutil.Error):
                psutil.Process(worker.pid).kill()


def submit(run: Run, asked: Request | str, *, launch: bool = True, **arguments: object) -> str:
    """Submit a request and return its id; starts a worker if none holds the run (unless ``launch`` is false).

    A search that was stopped or interrupted stays so: the worker only answers.

    Args:
        asked: one of ``studies.requests``; or the kind of one, whose ``arguments`` the worker checks.

    Raises:
        RunError: as ``start_worker``.
    """
    kind, arguments = (asked, arguments) if isinstance(asked, str) else (asked.kind, to_mapping(asked))
    run.refuse_if_recorded()
    if not run.worker_alive() and run.status().state in ("interrupted", "failed"):
        run.pause_marker.touch()
    request = f"{time.time_ns()}-{secrets.token_hex(2)}"
    write_json(request_path(run, request), {"id": request, "kind": kind, "arguments": arguments})
    if launch:
        _launch(run)
    return request


def request_path(run: Run, request: str) -> Path:
    """Return the path of a request, which exists until it is cancelled."""
    return run.path / "requests" / f"{request}.json"


def cancel(run: Run, *requests: str) -> None:
    """Cancel requests: queued ones never start, and the worker leaves the current one at its next step."""
    for request in requests:
        request_path(run, Path(request).name).unlink(missing_ok=True)


def pending_requests(run: Run) -> list[dict[str, object]]:
    """Return the requests without a result, the oldest first; background ones last."""
    folder = run.path / "requests"
    if not folder.is_dir():
        return []
    waiting = [path for path in sorted(folder.glob("[0-9]*.json")) if not result_path(run, path.stem).exists()]
    result = [with_current_names(body) for path in waiting if (body := read_json(path)) is not None]
    return sorted(result, key=lambda body: body.get("kind") in BACKGROUND)


def result_path(run: Run, request: str) -> Path:
    """Return the path of a request's result: ``{"ok": true, …}`` or ``{"ok": false, "error": …}``."""
    return run.path / "results" / f"{request}.json"


def results(run: Run) -> list[JsonMapping]:
    """Return the worker's results, the oldest first.

    Raises:
        RunError: one is damaged.
    """
    folder = run.path / "results"
    paths = sorted(folder.glob("[0-9]*.json")) if folder.is_dir() else []
    return [with_current_names(body) for path in paths if (body := read_json(path)) is not None]

"""Run directories: the one place where the dashboard, the command line and the worker meet. Torch-free.

::

    $LOWRANK_HOME (default ~/.cache/lowrank)
    ├── runs/<id>/
    │   ├── run.json         config, name, time, versions; a search that is extended is changed here
    │   ├── notes.json       what the user noted on it
    │   ├── storage.json     where the study is, if not here; may hold a password, so only its owner reads it
    │   ├── status.json      state, stage, progress, heartbeat; replaced atomically by the worker
    │   ├── model.json       what the model is made of              ─┐
    │   ├── text.json        splits, windows, tokens, hashes         │ written by the worker,
    │   ├── calibration.json figures of the statistics               │ each when its stage is done
    │   ├── spectra.npz      singular values and eigenvalues         │
    │   ├── curves.npz       errors by unit and rank                 │
    │   ├── study.journal    the Optuna study                       ─┘
    │   ├── events.jsonl     what happened, in order
    │   ├── workers/         what each further worker says of itself
    │   ├── paused           while it is there, no trial is started
    │   ├── requests/        what users ask of the worker (one JSON file each)
    │   ├── results/         its answers, under the same names
    │   ├── exports/         compressed models
    │   ├── sensitivity/     what modules cost when they alone are compressed, cell by cell
    │   └── worker.log
    └── statistics/<key>/    calibration results by content, shared by runs
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from lowrank_core.config import RunConfig, SearchConfig, from_mapping, to_mapping
from lowrank_core.errors import ConfigError, LowRankError, RunError

__all__ = [
    "ACTIVE_STATES",
    "Run",
    "RunStatus",
    "bundled_path",
    "create_run",
    "home",
    "list_runs",
    "open_run",
    "process_started",
    "read_json",
    "recorded_run",
    "statistics_home",
    "write_json",
]

JsonMapping = dict[str, Any]

ACTIVE_STATES = ("queued", "running", "stopping", "idle")
_PACKAGES = ("torch", "transformers", "optuna", "numpy", "streamlit")
_STUDY = "ranks"
_START_GRACE_SECONDS = 60


def home() -> Path:
    """Return the folder that holds runs and statistics: ``$LOWRANK_HOME``, else ``~/.cache/lowrank``."""
    return Path(os.environ.get("LOWRANK_HOME") or Path.home() / ".cache" / "lowrank").expanduser().absolute()


def statistics_home() -> Path:
    """Return the folder that holds statistics by their content, shared by all runs."""
    return home() / "statistics"


def bundled_path(*parts: str) -> Path:
    """Return the path of a file that ships with the package (from a checkout or an installed wheel)."""
    package = Path(__file__).resolve().parent
    root = package / "_bundle" if (package / "_bundle").is_dir() else package.parent
    return root.joinpath(*parts)


def read_json(path: Path) -> JsonMapping | None:
    """Return the object in ``path``; None if the file is not there (yet).

    Raises:
        RunError: the file is damaged.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read: {error}. Delete the run, or restore the file.") from error
    if not isinstance(body, dict):
        raise RunError(f"{path} holds no JSON object. Delete the run, or restore the file.")
    return body


def write_json(path: Path, body: Mapping[str, object], *, private: bool = False) -> None:
    """Replace ``path`` atomically: a reader sees the old object or the new one, never half of one.

    ``private`` leaves it to its owner alone.

    Raises:
        RunError: the disk is full or read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(body, stream, indent=1, allow_nan=False)
            if not private:
                Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide a shared run from the rest of a team
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(
            f"can't write {path}: {error.strerror}. Free some space, or set LOWRANK_HOME to a folder that you can write to."
        ) from error


@dataclass(frozen=True)
class RunStatus:
    """What the worker last said of itself.

    Attributes:
        state: ``new``, ``queued``, ``running``, ``stopping``, ``stopped``, ``idle`` (done, still warm), ``finished``, ``failed``
            or ``interrupted`` (its process died).
        stage: what it does now, in words.
        done, total: progress within the stage; total 0 where it can't be told.
        eta_seconds: estimate for the rest of the stage; None where there is none.
        message: an error or a hint for the user.
        warnings: what the user should know of the results.
        pid, pid_started: the process, and its start time as the system tells it (a pid alone may be reused).
        heartbeat: time of this record, seconds since the epoch.
        earlier_stop: the stop (``Run.stop_asked``) that stood before the work in hand began, and does not end it.
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

    @property
    def active(self) -> bool:
        """Whether a worker holds the run."""
        return self.state in ACTIVE_STATES

    @property
    def fraction(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total else None


def process_started(pid: int) -> float | None:
    """Return the start time of process ``pid``, or None if it is gone (a zombie is)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _status_from(body: JsonMapping, path: Path) -> RunStatus:
    try:
        return RunStatus(**{**body, "warnings": tuple(body.get("warnings", ()))})
    except TypeError as error:
        raise RunError(f"{path} is damaged: {error}. Delete the file, or the run.") from error


def _is_alive(status: RunStatus) -> bool:
    started = None if status.pid is None else process_started(status.pid)
    return started is not None and status.pid_started is not None and abs(started - status.pid_started) < 1


@dataclass(frozen=True)
class Run:
    """A run directory. Reading never changes it."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def record(self) -> JsonMapping:
        """The whole of run.json."""
        body = read_json(self.path / "run.json")
        if body is None:
            raise RunError(f"{self.path} is no run: it has no run.json. Give the folder of a run, or start one with `lowrank search`.")
        return body

    @property
    def config(self) -> RunConfig:
        try:
            return from_mapping(RunConfig, self.record["config"])
        except (ConfigError, KeyError) as error:
            raise RunError(f"{self.path / 'run.json'} is damaged: {error}. Delete the run, or restore the file.") from error

    @property
    def recorded(self) -> bool:
        """Whether this run ships with the package, to be looked at rather than continued."""
        return bool(self.record.get("recorded"))

    def refuse_if_recorded(self) -> None:
        """Raise unless this run may be continued, measured and exported.

        Raises:
            RunError: it ships with the package.
        """
        if self.recorded:
            raise RunError(
                "this run is a recording that ships with the package. Start a search of your own to go on, to measure and to export."
            )

    def change_search(self, **changes: object) -> SearchConfig:
        """Change the search of this run (how many trials, which sampler); a worker that is at it sees it before its next trial.

        Raises:
            RunError: the run is a recorded one, has no search, or can't be written.
            ConfigError: such a search can't be.
        """
        self.refuse_if_recorded()
        config = self.config
        if config.search is None:
            raise RunError("this run only analyses a model; it has no search to change. Start a search.")
        search = replace(config.search, **changes)  # type: ignore[arg-type]
        write_json(self.path / "run.json", {**self.record, "config": to_mapping(replace(config, search=search))})
        self.add_event("changed", **changes)
        return search

    @property
    def journal(self) -> Path:
        return self.path / "study.journal"

    @property
    def storage_url(self) -> str | None:
        """URL of the database that holds the study; None where it is in the journal."""
        body = read_json(self.path / "storage.json")
        return None if body is None else str(body.get("url"))

    @property
    def study_name(self) -> str:
        """Name of the study: in a database that other runs share, that of the run."""
        body = read_json(self.path / "storage.json")
        return _STUDY if body is None else str(body.get("study"))

    def keep_study_at(self, url: str, study: str) -> None:
        """Have the study in a database instead of the journal; before the search begins."""
        write_json(self.path / "storage.json", {"url": url, "study": study}, private=True)

    def part(self, name: str) -> JsonMapping | None:
        """Return model.json, text.json or calibration.json (by stem) once its stage is done."""
        return read_json(self.path / f"{name}.json")

    @property
    def pause_marker(self) -> Path:
        """While this file is there, the worker starts no trial."""
        return self.path / "paused"

    def _written_status(self) -> RunStatus:
        path = self.path / "status.json"
        body = read_json(path)
        return RunStatus() if body is None else _status_from(body, path)

    def stop_asked(self) -> int | None:
        """Return when trials were last stopped (nanoseconds, as the file system tells them); None where they are wanted."""
        try:
            return self.pause_marker.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def status(self) -> RunStatus:
        """Return the worker's last word, corrected if its process is dead."""
        status = self._written_status()
        if not status.active:
            return status
        if not self.worker_alive():
            return replace(status, state="interrupted", message="The worker's process ended before its work did. Resume to go on.")
        if status.state == "running" and self.stop_asked() not in (None, status.earlier_stop):
            return replace(status, state="stopping")
        return status

    def worker_alive(self) -> bool:
        """Whether a worker's process holds this run, or is about to."""
        status = self._written_status()
        if status.pid is None:
            # The starter has written the record, and the worker not yet taken over.
            return status.state == "queued" and time.time() - status.heartbeat < _START_GRACE_SECONDS
        return _is_alive(status)

    def write_status(self, status: RunStatus, path: Path | None = None) -> None:
        """Write the status of the worker that holds this run, or at ``path`` that of another one."""
        write_json(path or self.path / "status.json", {**asdict(status), "heartbeat": time.time()})

    @property
    def workers_folder(self) -> Path:
        return self.path / "workers"

    def further_workers(self) -> dict[str, RunStatus]:
        """Return id -> last word of the workers beside the one that holds this run, on this machine, that are alive."""
        found = {}
        for path in sorted(self.workers_folder.glob("[0-9]*.json")):
            try:
                status = _status_from(read_json(path) or {}, path)
            except RunError:
                continue  # it has just ended
            if _is_alive(status):
                found[path.stem] = status
        return found

    def add_event(self, kind: str, **details: object) -> None:
        """Append to events.jsonl."""
        line = json.dumps({"time": time.time(), "kind": kind, **details})
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the worker's log."""
        log = self.path / "worker.log"
        if not log.exists():
            return ""
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("lowrank-studio", *_PACKAGES):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def create_run(config: RunConfig, *, name: str = "", path: Path | None = None) -> Run:
    """Make a run directory, under the home unless ``path`` is given.

    Raises:
        RunError: the folder holds something already, or can't be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = path.absolute() if path is not None else home() / "runs" / f"{stamp}-{secrets.token_hex(2)}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty. Give a new folder, or resume the run in it with `lowrank worker --run {folder}`.")
    record = {
        "id": folder.name,
        "name": name or _default_name(config),
        "kind": "search" if config.search else "analysis",
        "created": time.time(),
        "config": to_mapping(_anchored(config)),
        "versions": _versions(),
        "recorded": False,
    }
    write_json(folder / "run.json", record)
    return Run(folder)


def _anchored(config: RunConfig) -> RunConfig:
    """Return ``config`` with absolute paths: a worker need not start in the folder that the user was in."""
    model, text = config.model.reference, config.text.reference
    if model != "demo" and Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    name, _, place = text.partition(":")
    if place:
        text = f"{name}:{Path(place).expanduser().absolute()}"
    return replace(config, model=replace(config.model, reference=model), text=replace(config.text, reference=text))


def _default_name(config: RunConfig) -> str:
    model = re.split(r"[\\/]", config.model.reference.rstrip("\\/"))[-1]
    text = re.split(r"[\\/]", config.text.reference)[-1]
    if config.search is None:
        return f"{model} on {text}"
    most = config.search.most_ratio
    ratios = f"{config.search.compression_ratio:.0%}" + (f" to {most:.0%}" if most is not None else "")
    return f"{model} on {text}, {ratios} removed"


def open_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in ``path``.

    Raises:
        RunError: there is none.
    """
    run = Run(Path(path).absolute())
    _ = run.config
    return run


def recorded_run() -> Run | None:
    """Return the run of the bundled model that ships with the package."""
    run = Run(bundled_path("assets", "recorded-run"))
    return run if (run.path / "run.json").exists() else None


def list_runs() -> list[Run]:
    """Return the runs under the home, the newest first; damaged ones are left out."""
    folder = home() / "runs"
    found = []
    for path in folder.glob("[!.]*") if folder.is_dir() else ():  # a run that is being deleted begins with a dot
        try:
            run = open_run(path)
            found.append((float(run.record["created"]), run))
        except (LowRankError, KeyError, TypeError, ValueError):
            continue
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)]

"""A run: record, study location, worker status, events."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowrank_core.config import RunConfig, SearchConfig, from_mapping, to_mapping
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs.files import JsonMapping, read_json, write_json
from lowrank_core.runs.status import RunStatus, is_alive, status_from

__all__ = ["Run"]

_STUDY = "ranks"
_START_GRACE_SECONDS = 60


@dataclass(frozen=True)
class Run:
    """A run directory. Reading never changes it."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def record(self) -> JsonMapping:
        """The contents of run.json."""
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
        """Whether this run is bundled, and so read-only."""
        return bool(self.record.get("recorded"))

    def refuse_if_recorded(self) -> None:
        """Raise unless this run may be changed.

        Raises:
            RunError: it ships with the package.
        """
        if self.recorded:
            raise RunError(
                "this run is a recording that ships with the package. Start a search of your own to go on, to measure and to export."
            )

    def change_search(self, **changes: object) -> SearchConfig:
        """Change the number of trials or the sampler; a running worker reads it before its next trial.

        Raises:
            RunError: the run is a recorded one, has no search, or can't be written.
            ConfigError: such a search can't be.
        """
        self.refuse_if_recorded()
        config = self.config
        if config.search is None:
            raise RunError("this run only analyses a model; it has no search to change. Start a search.")
        search = replace(config.search, **changes)  # type: ignore[arg-type]
        search.check_sampler()
        write_json(self.path / "run.json", {**self.record, "config": to_mapping(replace(config, search=search))})
        self.add_event("changed", **changes)
        return search

    @property
    def journal(self) -> Path:
        return self.path / "study.journal"

    @property
    def storage_url(self) -> str | None:
        """URL of the study's database; None if it is in the journal."""
        body = read_json(self.path / "storage.json")
        return None if body is None else str(body.get("url"))

    @property
    def study_name(self) -> str:
        """Name of the study: in a shared database, that of the run."""
        body = read_json(self.path / "storage.json")
        return _STUDY if body is None else str(body.get("study"))

    def keep_study_at(self, url: str, study: str) -> None:
        """Store the study in a database instead of the journal; call before the search starts."""
        write_json(self.path / "storage.json", {"url": url, "study": study}, private=True)

    def part(self, name: str) -> JsonMapping | None:
        """Return model.json, text.json or calibration.json (by stem) once its stage is done."""
        return read_json(self.path / f"{name}.json")

    @property
    def layers(self) -> frozenset[str]:
        """Names of the compressible layers in model.json; empty before the model is loaded."""
        layers = (self.part("model") or {}).get("layers", [])
        return frozenset(str(layer.get("name")) for layer in layers if isinstance(layer, dict))

    @property
    def pause_marker(self) -> Path:
        """Marker file that keeps the worker from starting trials."""
        return self.path / "paused"

    def _written_status(self) -> RunStatus:
        path = self.path / "status.json"
        body = read_json(path)
        return RunStatus() if body is None else status_from(body, path)

    def stop_asked(self) -> int | None:
        """Return when trials were last stopped (file-system nanoseconds); None if they are running."""
        try:
            return self.pause_marker.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def status(self) -> RunStatus:
        """Return the worker's status, corrected if its process is dead."""
        status = self._written_status()
        if not status.active:
            return status
        if not self.worker_alive():
            return replace(status, state="interrupted", message="The worker's process ended before its work did. Resume to go on.")
        if status.state == "running" and self.stop_asked() not in (None, status.earlier_stop):
            return replace(status, state="stopping")
        return status

    def worker_alive(self) -> bool:
        """Whether a worker holds this run, or is about to."""
        status = self._written_status()
        if status.pid is None:
            # The starter has written the record, and the worker not yet taken over.
            return status.state == "queued" and time.time() - status.heartbeat < _START_GRACE_SECONDS
        return is_alive(status)

    def write_status(self, status: RunStatus, path: Path | None = None) -> None:
        """Write the status of the run's worker, or at ``path`` that of another one."""
        write_json(path or self.path / "status.json", {**asdict(status), "heartbeat": time.time()})

    @property
    def workers_folder(self) -> Path:
        return self.path / "workers"

    def further_workers(self) -> dict[str, RunStatus]:
        """Return id -> status of the other live workers of this run on this machine."""
        result = {}
        for path in sorted(self.workers_folder.glob("[0-9]*.json")):
            try:
                status = status_from(read_json(path) or {}, path)
            except RunError:
                continue  # it has just ended
            if is_alive(status):
                result[path.stem] = status
        return result

    def add_event(self, kind: str, **details: object) -> None:
        """Append to events.jsonl."""
        line = json.dumps({"time": time.time(), "kind": kind, **details})
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def stage_seconds(self) -> dict[str, float]:
        """Return the longest duration of each stage: later workers reuse what the first one measured."""
        result: dict[str, float] = {}
        path = self.path / "events.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a line that is being written, or was when its worker was killed
            if event.get("kind") == "stage":
                result[event["name"]] = max(float(event["seconds"]), result.get(event["name"], 0.0))
        return result

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the worker's log."""
        log = self.path / "worker.log"
        if not log.exists():
            return ""
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

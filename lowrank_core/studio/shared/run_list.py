"""Runs as the dashboard lists them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.errors import LowRankError
from lowrank_core.runs import Run, RunStatus, list_runs, recorded_run
from lowrank_core.runs.client import pending_requests
from lowrank_core.runs.manage import notes_of
from lowrank_core.studies.records import best_trial, counts_of, read_trials
from lowrank_core.studio.shared.formatting import duration, local_time, shortened, timestamp
from lowrank_core.studio.shared.trial_names import ratio_words

__all__ = [
    "PARTS",
    "Signature",
    "Stage",
    "all_runs",
    "default_run",
    "find_run",
    "STATE_WORDS",
    "has_data",
    "is_busy",
    "is_working",
    "run_labels",
    "run_table",
    "signature",
    "stages",
    "status_words",
]

PARTS = ("model.json", "text.json", "calibration.json", "spectra.npz", "curves.npz", "study.journal")
_NOTES = 80  # characters in the table
_WORKING = ("queued", "running", "stopping")

STATE_WORDS = {
    "new": "not started",
    "queued": "starting",
    "running": "running",
    "stopping": "stopping",
    "stopped": "stopped",
    "idle": "done",
    "finished": "done",
    "failed": "failed",
    "interrupted": "interrupted",
}

Signature = tuple[str, bool, tuple[bool, ...], int]


def is_working(status: RunStatus) -> bool:
    """Return whether a worker changes the run; an idle one does not."""
    return status.state in _WORKING


def is_busy(run: Run) -> bool:
    """Return whether the page should poll: work is running or about to start.

    A warm worker takes a fraction of a second to see that a stopped search was resumed or a request was left.
    """
    status = run.status()
    if is_working(status):
        return True
    return run.worker_alive() and (bool(pending_requests(run)) or (status.state == "stopped" and not run.pause_marker.exists()))


def has_data(run: Run) -> bool:
    """Return whether the run has data."""
    return (run.path / "model.json").exists()


def all_runs() -> list[Run]:
    """Return the user's runs, the newest first, then the recorded one."""
    recorded = recorded_run()
    return [*list_runs(), *([recorded] if recorded else [])]


def find_run(identifier: str) -> Run | None:
    return next((run for run in all_runs() if run.id == identifier), None)


def default_run() -> Run | None:
    """Return the newest run with data (or about to have it), else the recorded one."""
    return next((run for run in list_runs() if has_data(run) or is_working(run.status())), recorded_run())


def run_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return id -> label for a picker: short, unique and stable.

    Streamlit knows an option by its label: one that changed or came twice would pick another run.
    """
    labels: dict[str, str] = {}
    for run in reversed(runs):  # the oldest first: a newer run does not rename it
        label = _label(run)
        labels[run.id] = f"{label} ({run.id[-4:]})" if label in labels.values() else label
    return {run.id: labels[run.id] for run in runs}


def _label(run: Run) -> str:
    config = run.config
    model = re.split(r"[\\/]", config.model.reference.rstrip("\\/"))[-1]
    what = f"−{ratio_words(config.search)}" if config.search else "spectra"
    return f"{model} {what} · {'recorded' if run.recorded else timestamp(float(run.record['created']))}"


def signature(run: Run) -> Signature:
    """Return the state that a page's layout depends on; a change redraws it."""
    status = run.status()
    results = sum(1 for _ in (run.path / "results").glob("[0-9]*.json"))
    return status.state, is_working(status), tuple((run.path / part).exists() for part in PARTS), results


def status_words(status: RunStatus) -> str:
    """Return the progress within the stage: ``24 of 256 · about 12 s left · stage 3 of 4, about 2 min 05 s left in all``."""
    words = [f"{status.done:,} of {status.total:,}"] if status.total else []
    if status.eta_seconds is not None and is_working(status):
        words.append(f"about {duration(status.eta_seconds)} left")
    if status.stage_number and is_working(status):
        rest = f", about {duration(status.all_left_seconds)} left in all" if status.all_left_seconds is not None else ""
        words.append(f"stage {status.stage_number} of {status.stages}{rest}")
    return " · ".join(words)


@dataclass(frozen=True)
class Stage:
    """A finished stage of a run and the seconds it took."""

    name: str
    seconds: float


def stages(status: RunStatus) -> list[Stage]:
    return [Stage(name, seconds) for name, seconds in (status.timings or {}).items()]


def run_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each run; a damaged study leaves its cells empty."""
    return pd.DataFrame([_row(run) for run in runs], columns=["id", "name", "state", "ratio", "trials", "best", "created", "notes"])


def _row(run: Run) -> dict[str, object]:
    record, config = run.record, run.config
    try:
        trials, notes = read_trials(run), notes_of(run)
    except LowRankError:
        trials, notes = [], ""
    best = best_trial(trials) if config.search is not None and config.search.max_ratio is None else None
    return {
        "id": run.id,
        "name": record["name"],
        "state": "recorded" if run.recorded else STATE_WORDS.get(run.status().state, "unknown"),
        "ratio": ratio_words(config.search) if config.search else None,
        "trials": counts_of(trials).complete if config.search else None,
        "best": best.value if best else None,
        "created": local_time(float(record["created"])),
        "notes": shortened(notes, _NOTES) or None,
    }

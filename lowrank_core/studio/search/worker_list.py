"""Workers of a run: trials measured, current state."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

import pandas as pd

from lowrank_core.runs import Run, RunStatus
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.shared.formatting import duration
from lowrank_core.studio.shared.run_list import is_working
from lowrank_core.studio.shared.trial_names import trial_label

__all__ = ["living_workers", "worker_table"]


def living_workers(run: Run) -> dict[str, RunStatus]:
    """Return ``host:pid`` -> status of the live workers on this machine, the run's own first."""
    host, result = socket.gethostname(), {}
    status = run.status()
    if status.pid is not None and run.worker_alive():
        result[f"{host}:{status.pid}"] = status
    return result | {f"{host}:{pid}": word for pid, word in run.further_workers().items()}


def worker_table(trials: Sequence[TrialRecord], living: Mapping[str, RunStatus], now: float) -> pd.DataFrame:
    """Return a row for each worker: name, measured trials, state at ``now``.

    Workers on other machines are known by their trials alone.
    """
    names = list(dict.fromkeys([*living, *(trial.worker for trial in trials if trial.worker)]))
    rows = [
        {
            "worker": name,
            "measured": sum(1 for trial in trials if trial.worker == name and (trial.finished or trial.state == "pruned")),
            "now": _now(name, trials, living, now),
        }
        for name in names
    ]
    return pd.DataFrame(rows, columns=["worker", "measured", "now"])


def _now(name: str, trials: Sequence[TrialRecord], living: Mapping[str, RunStatus], now: float) -> str:
    status = living.get(name)
    here = name.rpartition(":")[0] == socket.gethostname()
    running = next((trial for trial in reversed(trials) if trial.worker == name and trial.state == "running"), None)
    if running is not None and (status is not None or not here):
        since = "" if running.started is None else f", for {duration(now - running.started)}"
        return f"{trial_label(running)}{since}"
    if status is None:
        return "ended" if here else "no trial running"
    return status.stage or ("working" if is_working(status) else "idle")

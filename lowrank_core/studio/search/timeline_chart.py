"""Timeline of workers and trials: its data and chart, and the list of workers."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence

import pandas as pd

from lowrank_core.runs import Run, RunStatus
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.shared.formatting import duration, short_duration
from lowrank_core.studio.shared.run_list import is_working
from lowrank_core.studio.shared.table import frame_of
from lowrank_core.studio.shared.trial_names import kind_of, trial_label
from lowrank_core.studio.shared.vega import LEGEND, Spec, VegaChart, trial_points, trial_ring

__all__ = ["living_workers", "timeline", "timeline_chart", "worker_table"]

_UNKNOWN = "unknown worker"
_COLUMNS = ("number", "worker", "kind", "start", "end", "seconds", "note")


def timeline(trials: Sequence[TrialRecord], living: Collection[str], now: float) -> pd.DataFrame:
    """Return a row for each started trial: columns number, worker, kind, start, end (UTC), seconds, note.

    A running trial ends ``now`` if its worker is in ``living``; of one whose worker is gone nobody knows the end, so it has no length.
    """
    rows = [_row(trial, living, now) for trial in trials if trial.started is not None]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _row(trial: TrialRecord, living: Collection[str], now: float) -> dict[str, object]:
    start = trial.started or 0.0
    lost = trial.ended is None and trial.worker not in living
    end = trial.ended if trial.ended is not None else start if lost else max(now, start)
    if end < start:  # the clock was set back meanwhile
        end = start + (trial.seconds or 0.0)
    took = "its worker is gone" if lost else f"{'for' if trial.ended is None else 'took'} {short_duration(end - start)}"
    return {
        "number": trial.number,
        "worker": trial.worker or _UNKNOWN,
        "kind": kind_of(trial),
        "start": pd.Timestamp(start, unit="s", tz="UTC"),
        "end": pd.Timestamp(end, unit="s", tz="UTC"),
        "seconds": end - start,
        "note": f"{trial_label(trial)}, {kind_of(trial)}, {took}",
    }


_CLOCK = {"seconds": "%H:%M:%S", "minutes": "%H:%M", "hours": "%H:%M", "day": "%d %b", "date": "%d %b"}
_ROW, _AROUND = 46, 130  # pixels: a worker; axis and legend, which Streamlit fits into the height, too


def timeline_chart(frame: pd.DataFrame, chosen: int | None = None) -> VegaChart:
    """Draw each trial of a ``timeline`` as a bar with a mark for its outcome."""
    rows = frame.assign(row="trial", chosen=frame["number"] == (-1 if chosen is None else chosen))
    return VegaChart(rows, _spec(max(1, frame["worker"].nunique())))


def _spec(workers: int) -> Spec:
    axis = {"grid": False, "labelOverlap": True, "format": _CLOCK}
    time = {"type": "temporal", "title": "Time of this browser", "scale": {"padding": 12}, "axis": axis}
    y = {
        "field": "worker",
        "type": "ordinal",
        "title": None,
        "axis": {"labelLimit": {"expr": "width < 420 ? 80 : 180"}, "domain": False, "ticks": False},
    }
    end = {**time, "field": "end"}
    points = trial_points(end, y, "x")
    span = {"x": {**time, "field": "start"}, "x2": {"field": "end"}, "y": y}
    bar = {
        "mark": {"type": "rule", "strokeWidth": 12, "opacity": 0.4, "clip": True},
        "encoding": {**span, "stroke": points["encoding"]["stroke"], "tooltip": {"field": "note"}},
    }
    return {
        "height": _ROW * workers + _AROUND,
        "layer": [bar, points, trial_ring(end, y)],
        "config": {"legend": {**LEGEND["legend"], "symbolOpacity": 1}},
    }


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

    def measured(name: str) -> int:
        return sum(trial.worker == name and (trial.finished or trial.state == "pruned") for trial in trials)

    return frame_of(names, worker=str, measured=measured, now=lambda name: _now(name, trials, living, now))


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

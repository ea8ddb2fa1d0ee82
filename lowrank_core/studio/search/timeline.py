"""Timeline of workers and trials."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.shared.formatting import short_duration
from lowrank_core.studio.shared.trial_names import kind_of, trial_label

__all__ = ["timeline"]

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

"""Losses of a trial by window, next to another trial: data and live chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.studies.records import TrialRecord, best_trial
from lowrank_core.studio.shared.chart_style import BLUE, GREEN, GREY
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.trial_names import trial_label
from lowrank_core.studio.shared.vega import Spec, VegaChart

__all__ = ["WindowLosses", "window_chart", "window_losses"]

_MEASURES = {"kl": "KL (nats per token)"}


@dataclass(frozen=True)
class WindowLosses:
    """Losses of a trial and a reference trial on search-validation windows.

    Attributes:
        measure: what a loss is, with its unit.
        shown, other: names of the two trials.
        running: whether ``shown`` is being measured now.
        frame: columns window, shown (NaN until measured), other (NaN where it was not), note.
        measured: windows that both have seen.
        shown_mean, other_mean: mean losses over these; None without any.
    """

    measure: str
    shown: str
    other: str
    running: bool
    frame: pd.DataFrame
    measured: int
    shown_mean: float | None
    other_mean: float | None


def window_losses(trials: Sequence[TrialRecord], chosen: int | None, objective: str) -> WindowLosses | None:
    """Return the running trial (else ``chosen``, else the best) next to the best one (the best next to uniform).

    None where no losses by window were recorded.
    """
    best = best_trial([trial for trial in trials if trial.windows])
    if best is None:
        return None
    running = [trial for trial in trials if trial.state == "running" and trial.windows]
    picked = next((trial for trial in trials if trial.number == chosen and trial.windows), None)
    shown = running[-1] if running else picked or best
    uniform = next((trial for trial in trials if trial.label == "uniform" and trial.state == "complete" and trial.windows), None)
    other = best if shown.number != best.number else uniform if uniform is not None else best
    return _beside(shown, other, _MEASURES.get(objective, "Loss (nats per token)"))


def _beside(shown: TrialRecord, other: TrialRecord, measure: str) -> WindowLosses:
    windows = sorted(set(shown.windows) | set(other.windows))
    common = sorted(set(shown.windows) & set(other.windows))
    frame = pd.DataFrame(
        {
            "window": windows,
            "shown": pd.Series([shown.windows.get(window) for window in windows], dtype=float),
            "other": pd.Series([other.windows.get(window) for window in windows], dtype=float),
        }
    )
    frame["note"] = [_note(window, shown, other) for window in windows]
    return WindowLosses(
        measure=measure,
        shown=trial_label(shown),
        other=trial_label(other),
        running=shown.state == "running",
        frame=frame,
        measured=len(common),
        shown_mean=sum(shown.windows[w] for w in common) / len(common) if common else None,
        other_mean=sum(other.windows[w] for w in common) / len(common) if common else None,
    )


def _note(window: int, *trials: TrialRecord) -> str:
    losses = [f"{trial_label(trial)} {number(trial.windows.get(window), 4)}" for trial in trials]
    return f"window {window}: {', '.join(losses)}"


def window_chart(view: WindowLosses) -> VegaChart:
    """Draw the loss on each window: dots for the trial, bars for the other, a stem between them."""
    return VegaChart(view.frame, _spec(view.measure))


def _spec(measure: str) -> Spec:
    x = {
        "field": "window",
        "type": "quantitative",
        "title": "Search-validation window",
        "scale": {"nice": False, "zero": False, "padding": 12},
        "axis": {"format": "d", "tickMinStep": 1, "grid": False},
    }

    def y(field: str) -> Spec:
        return {
            "field": field,
            "type": "quantitative",
            "title": measure,
            "scale": {"zero": False},
            "axis": {"format": "~g", "tickCount": 5},
        }

    both = [{"filter": "isValid(datum.shown) && isValid(datum.other)"}]
    tip = {"field": "note"}
    stem = {"mark": {"type": "rule", "color": GREY, "strokeWidth": 1.2}, "encoding": {"x": x, "y": y("shown"), "y2": {"field": "other"}}}
    other = {"type": "point", "shape": "stroke", "size": 150, "strokeWidth": 3, "color": GREEN, "opacity": 1}
    shown = {"type": "point", "shape": "circle", "size": 55, "filled": True, "color": BLUE, "opacity": 1}
    return {
        "height": 220,
        "layer": [
            {"transform": both, **stem},
            _points(other, "other", x, y("other"), tip),
            _points(shown, "shown", x, y("shown"), tip),
        ],
    }


def _points(mark: Spec, field: str, x: Spec, y: Spec, tip: Spec) -> Spec:
    return {"transform": [{"filter": f"isValid(datum.{field})"}], "mark": mark, "encoding": {"x": x, "y": y, "tooltip": tip}}

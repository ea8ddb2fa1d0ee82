"""State of a manual allocation (requested, queued, measured), and its result next to best and baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.allocation import ALLOCATORS, Ranks
from lowrank_core.allocation.curves import CurveRecord
from lowrank_core.config import SearchConfig
from lowrank_core.runs import JsonMapping
from lowrank_core.studies.records import TrialRecord, best_trial
from lowrank_core.studio.compare.comparison import argument_of
from lowrank_core.studio.manual.expected_kl import measured_as, predicted_kl
from lowrank_core.studio.shared.trial_names import trial_label

__all__ = ["Picked", "alongside", "picked"]


@dataclass(frozen=True)
class Picked:
    """State of the measurement of some ranks.

    Attributes:
        stage: ``new`` (nobody asked), ``asked``, ``waiting`` (queued as a trial), ``running``, ``measured``, ``failed`` or ``refused``.
        trial: that measures these ranks; None before there is one.
        error: why it was refused.
        others: how many other allocations wait for the worker.
    """

    stage: str
    trial: TrialRecord | None = None
    error: str = ""
    others: int = 0

    @property
    def open(self) -> bool:
        """Whether the worker has not finished it."""
        return self.stage in ("asked", "waiting", "running")


def picked(ranks: Ranks, trials: Sequence[TrialRecord], pending: Sequence[JsonMapping], bodies: Sequence[JsonMapping]) -> Picked:
    """Return the state of ``ranks`` from the pending requests and the worker's results, the oldest first."""
    waiting = [_asked(request) for request in pending if request.get("kind") == "measure"]
    mine = [asked for asked in waiting if _same(asked, ranks)]
    others, trial = len(waiting) - len(mine), measured_as(trials, ranks)
    if trial is not None and trial.finished:
        return Picked("measured", trial, others=others)
    if mine:
        return Picked("asked", others=others)
    if trial is not None and trial.state in ("waiting", "running", "failed"):
        return Picked(trial.state, trial, trial.error, others)
    answer = next((body for body in reversed(bodies) if body.get("kind") == "measure" and _same(_asked(body), ranks)), None)
    if answer is not None and not answer.get("ok"):
        return Picked("refused", error=str(answer.get("error") or "no reason given"), others=others)
    return Picked("new", others=others)


def _asked(request: JsonMapping) -> Mapping[str, object]:
    ranks = argument_of(request, "ranks")
    return ranks if isinstance(ranks, Mapping) else {}


def _same(asked: Mapping[str, object], ranks: Ranks) -> bool:
    """Return whether two allocations compress alike; an empty one matches none."""
    return bool(asked) and {n: r for n, r in asked.items() if r is not None} == {n: r for n, r in ranks.items() if r is not None}


def alongside(trial: TrialRecord, trials: Sequence[TrialRecord], search: SearchConfig, record: CurveRecord | None) -> pd.DataFrame:
    """Return ``trial`` next to the best trial and the uniform baseline: columns trial, name, kl, perplexity, removed, predicted.

    Over a range of ratios there is no best, and the uniform baseline is the one nearest in ratio.
    """
    best = best_trial(trials) if search.max_ratio is None else None
    uniform = [t for t in trials if t.label == "uniform" and t.finished and t.compression_ratio is not None]
    nearest = min(uniform, key=lambda t: abs((t.compression_ratio or 0.0) - (trial.compression_ratio or 0.0)), default=None)
    named: dict[int, tuple[str, TrialRecord]] = {}
    for words, result in (("Uniform", nearest), ("Best", best), ("This draft", trial)):
        if result is not None:
            known = named.get(result.number)
            named[result.number] = (f"{words}, {known[0].lower()}" if known else words, result)
    rows = [
        {
            "trial": number,
            "name": f"{words}: trial {number}" if result.label in ALLOCATORS else f"{words}: {trial_label(result)}",
            "kl": result.kl,
            "perplexity": result.perplexity,
            "removed": result.compression_ratio,
            "predicted": predicted_kl(record, result.ranks),
        }
        for number, (words, result) in sorted(named.items(), key=lambda pair: pair[0] != trial.number)
    ]
    return pd.DataFrame(rows, columns=["trial", "name", "kl", "perplexity", "removed", "predicted"]).astype(
        {"kl": float, "predicted": float}
    )

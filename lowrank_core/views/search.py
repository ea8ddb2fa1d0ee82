"""A rank search as it streams in: history, baselines, best so far, and the allocation of a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.accounting import MatrixShape, Unit
from lowrank_core.allocation import ALLOCATORS, RankAllocation, allocate, allocation_from_ranks
from lowrank_core.config import CompressionConfig, RunConfig, SearchConfig
from lowrank_core.search.records import TrialRecord, best_trial
from lowrank_core.units import plan_units, value_layers
from lowrank_core.views.formatting import number, percent
from lowrank_core.views.layermap import LayerMap, layer_map

__all__ = [
    "OBJECTIVE_LABELS",
    "SAMPLER_LABELS",
    "History",
    "Progress",
    "allocation_map",
    "allocation_of",
    "search_params",
    "check_budget",
    "history",
    "progress",
    "search_units",
    "trial_label",
    "trial_table",
]


OBJECTIVE_LABELS = {
    "kl": "KL to the dense model (nats per token)",
    "perplexity": "Perplexity",
    "bolaco": "Bolaco: perplexity + weighted KL",
}
SAMPLER_LABELS = {"gp": "Gaussian process", "random": "Random"}


def trial_label(trial: TrialRecord) -> str:
    """Return ``trial 7``, or the baseline's name with its number."""
    name = ALLOCATORS[trial.label].label if trial.label in ALLOCATORS else ""
    return f"{name} (trial {trial.number})" if name else f"Trial {trial.number}"


@dataclass(frozen=True)
class History:
    """The study over its trials.

    Attributes:
        objective: label of the value, with its unit.
        trials: columns number, state, label, value (NaN without one), best (least value so far), note.
        baselines: label -> value of the enqueued baselines that are complete.
    """

    objective: str
    trials: pd.DataFrame
    baselines: Mapping[str, float]


def history(trials: Sequence[TrialRecord], objective: str) -> History:
    """Return the history of ``trials`` by number."""
    frame = pd.DataFrame(
        {
            "number": [trial.number for trial in trials],
            "state": [trial.state for trial in trials],
            "label": [trial.label for trial in trials],
            "value": pd.Series([trial.value for trial in trials], dtype=float),
            "note": [_note(trial) for trial in trials],
        }
    )
    frame["best"] = frame["value"].where(frame["state"] == "complete").cummin().ffill()
    baselines = {
        ALLOCATORS[t.label].label: t.value for t in trials if t.label in ALLOCATORS and t.state == "complete" and t.value is not None
    }
    return History(OBJECTIVE_LABELS[objective], frame, baselines)


def _note(trial: TrialRecord) -> str:
    measured = f"value {number(trial.value, 4)}, perplexity {number(trial.perplexity)}, {percent(trial.compression_ratio)} removed"
    return f"{trial_label(trial)}, {trial.state}: {measured}"


@dataclass(frozen=True)
class Progress:
    """Best so far against the uniform baseline, on search-validation text.

    Attributes:
        gain: fraction by which the best value lies below the uniform one; None without both.
    """

    complete: int
    wanted: int
    best: TrialRecord | None
    uniform_value: float | None
    uniform_perplexity: float | None

    @property
    def gain(self) -> float | None:
        if self.best is None or self.best.value is None or not self.uniform_value:
            return None
        return 1 - self.best.value / self.uniform_value


def progress(trials: Sequence[TrialRecord], search: SearchConfig) -> Progress:
    """Return how far a search is."""
    uniform = next((trial for trial in trials if trial.label == "uniform" and trial.state == "complete"), None)
    return Progress(
        complete=sum(1 for trial in trials if trial.finished),
        wanted=search.trials,
        best=best_trial(trials),
        uniform_value=uniform.value if uniform else None,
        uniform_perplexity=uniform.perplexity if uniform else None,
    )


def trial_table(trials: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return a row for each trial, by number, with a column for each variable of the space."""
    best = best_trial(trials)
    rows = [
        {
            "trial": trial.number,
            "state": trial.state,
            "kind": (ALLOCATORS[trial.label].label if trial.label in ALLOCATORS else trial.label) + (" ★ best" if trial is best else ""),
            "value": trial.value,
            "perplexity": trial.perplexity,
            "kl": trial.kl,
            "removed": trial.compression_ratio,
            "seconds": trial.seconds,
            **trial.params,
        }
        for trial in trials
    ]
    return pd.DataFrame(rows, columns=None if rows else ["trial", "state", "kind", "value", "perplexity", "kl", "removed", "seconds"])


def search_params(trials: Sequence[TrialRecord]) -> list[str]:
    """Return the variables of the space, in the order of the study."""
    return list(dict.fromkeys(name for trial in trials for name in trial.params))


def search_units(matrices: Sequence[MatrixShape], compression: CompressionConfig) -> tuple[Unit, ...]:
    """Return what a search with ``compression`` gives ranks to."""
    return plan_units(matrices, compression.without_alternatives)


def allocation_of(trial: TrialRecord, units: Sequence[Unit]) -> RankAllocation:
    """Return what a trial allocated.

    Raises:
        ConfigError: its ranks do not fit ``units``.
    """
    return allocation_from_ranks(f"trial {trial.number}", units, trial.ranks)


def allocation_map(allocation: RankAllocation, units: Sequence[Unit]) -> LayerMap:
    """Return the kept fraction of each matrix's parameters, 1 where it stays dense, that of its stack where it is in one."""
    known = {unit.name: unit for unit in units}
    matrices, ranks, kept = [], [], []
    for name, rank in allocation.ranks.items():
        for member in known[name].members:
            matrices.append(member)
            ranks.append(rank)
            kept.append(known[name].parameters(rank) / known[name].dense_parameters)
    labels = ["dense" if rank is None else f"rank {rank}, {percent(share, 0)} kept" for rank, share in zip(ranks, kept, strict=True)]
    return layer_map(matrices, kept, labels, "Parameters kept", percent=True, full_scale=True)


def check_budget(config: RunConfig, matrices: Sequence[MatrixShape]) -> RankAllocation | None:
    """Return the uniform allocation of a search that is about to start; None if it only analyses.

    Raises:
        BudgetError: the ratio can't be met by the matrices that may be compressed.
    """
    if config.search is None:
        return None
    compression = config.search.compression
    dense = value_layers(matrices) if compression.value_dense else ()
    return allocate("uniform", search_units(matrices, compression), config.search.compression_ratio, keep_dense=dense)

"""Predicted KL divergence from error curves, and its agreement with measured trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.allocation import Ranks
from lowrank_core.allocation.curves import CurveRecord
from lowrank_core.metrics import metric_named
from lowrank_core.studies.records import MANUAL, TrialRecord
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.table import frame_of
from lowrank_core.studio.shared.trial_names import kind_of, trial_label

__all__ = ["Trust", "estimate_words", "measured_as", "predicted_kl", "trial_predictions", "trust"]

_MIN_TRIALS = 3


def predicted_kl(record: CurveRecord | None, ranks: Ranks) -> float | None:
    """Return Σ e_u(r_u), nats per token; None where errors predict no KL divergence, or one of them is not known."""
    if record is None or not record.predicts:
        return None
    errors = [record.error(name, rank) for name, rank in ranks.items()]
    known = [error for error in errors if error is not None]
    return sum(known) if len(known) == len(errors) else None


def estimate_words(record: CurveRecord) -> str:
    """Return the method of a prediction, or the reason for none, in words."""
    label = metric_named(record.basis).label
    if record.estimate == "own":
        return (
            f"{label} measures the error of every matrix in a unit of its own, so errors of different matrices can't be added up: the "
            "table shows the energy that each keeps, and no ΔKL is predicted. The basis two_sided predicts one."
        )
    added = "Errors are summed as if layers were independent, without the sequential fit."
    if record.estimate == "error_weights":
        return (
            f"{label}; every unit's error is weighted by its ΔKL/Δe, measured on validation text with this unit alone compressed. {added}"
        )
    return (
        f"K-FAC's second-order estimate, ½ tr(G ΔW C ΔWᵀ) for every unit, from the gradients G and inputs C of the calibration text "
        f"({label}). {added}"
    )


def trial_predictions(trials: Sequence[TrialRecord], record: CurveRecord | None) -> pd.DataFrame:
    """Return a row for each trial with a measured and a predicted KL divergence above zero, by number.

    Columns: trial, name, kind (one of ``KINDS``), predicted, measured (nats per token), removed.
    """
    known = [
        trial
        for trial in trials
        if trial.finished and trial.kl is not None and trial.kl > 0 and (predicted_kl(record, trial.ranks) or 0.0) > 0
    ]
    return frame_of(
        known,
        trial="number",
        name=trial_label,
        kind=lambda trial: "manual" if trial.label == MANUAL else kind_of(trial),
        predicted=lambda trial: predicted_kl(record, trial.ranks),
        measured="kl",
        removed="compression_ratio",
    )


@dataclass(frozen=True)
class Trust:
    """Agreement of predictions with a run's measurements; forecasts are in ``expectation``.

    Attributes:
        trials: how many.
        median, low, high: of measured over predicted; the 10th and 90th percentile.
        order: Spearman's rank correlation; None where all are equal.
    """

    trials: int
    median: float
    low: float
    high: float
    order: float | None

    def sentence(self) -> str:
        order = "" if self.order is None else f" The rank correlation of the two is {self.order:.2f}; 1 is the same order."
        return (
            f"Over {self.trials} measured allocations of this run, the measured KL was {number(self.low)} to {number(self.high)} times the "
            f"predicted one (80 % of them; median {number(self.median)}).{order}"
        )


def trust(predictions: pd.DataFrame) -> Trust | None:
    """Return the ratio and rank correlation of ``trial_predictions``; None below three trials."""
    if len(predictions) < _MIN_TRIALS:
        return None
    ratios = (predictions["measured"] / predictions["predicted"]).to_numpy(dtype=float)
    low, median, high = (float(value) for value in np.percentile(ratios, [10, 50, 90]))
    ranks = predictions[["predicted", "measured"]].rank()
    spread = ranks.std()
    order = float(ranks["predicted"].corr(ranks["measured"])) if (spread > 0).all() else None
    return Trust(len(ratios), median, low, high, order)


def measured_as(trials: Sequence[TrialRecord], ranks: Ranks) -> TrialRecord | None:
    """Return the trial with exactly these ranks: the newest complete one, else the newest; None without one.

    Layers that stay dense count as equal however they are grouped.
    """
    wanted = _compressed(ranks)
    alike = [trial for trial in trials if trial.ranks and _compressed(trial.ranks) == wanted]
    done = [trial for trial in alike if trial.finished and trial.kl is not None]
    return next(reversed(done or alike), None)


def _compressed(ranks: Ranks) -> dict[str, int]:
    return {name: rank for name, rank in ranks.items() if rank is not None}

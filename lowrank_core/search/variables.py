"""What trials tell of the variables of a search: their ranges, and how much each matters. Torch-free.

Importance is PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), as Optuna has it: how much the distribution of a variable among the better
half of the trials differs from that among all of them. It is told from the trials that there are, which the sampler chose: an estimate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from lowrank_core.runs import Run
from lowrank_core.search.records import read_frozen

__all__ = ["Importance", "Importances", "VariableRange", "importances", "read_importances", "read_ranges"]

_LEAST_TRIALS, _TRIALS_PER_VARIABLE = 16, 3
_BETTER = 0.5
"""Searches have tens of trials: where one of five variables decides, 16 random trials tell it by their better half in 12 of 12 draws, by
their best tenth (Optuna's default) in 7."""
_RESAMPLES, _TAIL = 20, 5.0  # draws with replacement, and percent below and above the interval


@dataclass(frozen=True)
class VariableRange:
    """Between which values a variable may lie; ``log``: on a log scale."""

    low: float
    high: float
    log: bool

    def position(self, value: float) -> float:
        """Return where ``value`` lies in the range, in [0, 1]."""
        if self.high <= self.low:
            return 0.5
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return min(1.0, max(0.0, (at - low) / (high - low)))


@dataclass(frozen=True)
class Importance:
    """Share of a variable, in [0, 1], and the middle 90 % of it over trials that are drawn again."""

    name: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Importances:
    """Importances, the largest first; none while trials are ``missing``. ``trials`` were gone by."""

    found: tuple[Importance, ...]
    trials: int
    missing: int


def read_ranges(run: Run) -> dict[str, VariableRange]:
    """Return the range of every variable of the study of ``run``.

    Raises:
        as ``read_trials``.
    """
    found: dict[str, VariableRange] = {}
    for trial in read_frozen(run):
        for name, distribution in trial.distributions.items():
            if isinstance(distribution, FloatDistribution):
                found.setdefault(name, VariableRange(distribution.low, distribution.high, distribution.log))
    return found


def read_importances(run: Run) -> Importances:
    """Return how much each variable of the study of ``run`` matters for its value.

    Raises:
        as ``read_trials``.
    """
    return importances(read_frozen(run))


def importances(trials: Sequence[FrozenTrial]) -> Importances:
    """Return the importances among the complete ``trials`` that have every variable; the last value of a trial is what is minimised."""
    names = tuple(dict.fromkeys(name for trial in trials for name in trial.params))
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE and set(trial.params) == set(names) and trial.values]
    needed = max(_LEAST_TRIALS, _TRIALS_PER_VARIABLE * len(names))
    if not names or len(whole) < needed:
        return Importances((), len(whole), needed - len(whole) if names else needed)
    shares = _shares(whole)
    generator = np.random.default_rng(0)
    drawn = [_shares([whole[i] for i in generator.integers(0, len(whole), len(whole))]) for _ in range(_RESAMPLES)]
    found = []
    for name in sorted(names, key=lambda name: -shares.get(name, 0.0)):
        low, high = np.percentile([draw.get(name, 0.0) for draw in drawn], (_TAIL, 100 - _TAIL))
        found.append(Importance(name, shares.get(name, 0.0), float(low), float(high)))
    return Importances(tuple(found), len(whole), 0)


def _shares(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study = optuna.create_study()
        study.add_trials([_alone(trial) for trial in trials])
        return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_BETTER)))


def _alone(trial: FrozenTrial) -> FrozenTrial:
    """Return the trial with its last value, that of the loss, as the only one."""
    distributions: dict[str, BaseDistribution] = dict(trial.distributions)
    return create_trial(value=trial.values[-1], params=trial.params, distributions=distributions)

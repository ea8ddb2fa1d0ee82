"""The two variables of a depth bias, by a few trials of TPE on a measured loss. Torch-free."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler

from lowrank_core.allocation.lems import MAX_ALPHA, MAX_GAMMA, TRIALS, DepthBias

__all__ = ["ALPHA", "GAMMA", "VARIABLES", "best_depth_bias"]

optuna.logging.set_verbosity(optuna.logging.ERROR)

ALPHA, GAMMA = "depth alpha", "depth gamma"
VARIABLES = {ALPHA: FloatDistribution(0.0, MAX_ALPHA), GAMMA: FloatDistribution(0.0, MAX_GAMMA)}
_STARTUP = 4  # of TPE's own ten random trials none would be left to its model


def best_depth_bias(measure: Callable[[DepthBias], float], *, trials: int = TRIALS, seed: int = 0) -> tuple[DepthBias, float]:
    """Return the depth bias of the smallest loss that ``measure`` gave, and the loss; the first trial is none at all, γ = 0.

    ``measure`` gives infinity where the model diverges.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = TPESampler(seed=seed, n_startup_trials=_STARTUP, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({ALPHA: 0.0, GAMMA: 0.0})
    best: tuple[DepthBias, float] | None = None
    for _ in range(trials):
        trial = study.ask(dict(VARIABLES))
        bias = DepthBias(trial.params[ALPHA], trial.params[GAMMA])
        loss = measure(bias)
        study.tell(trial, loss if math.isfinite(loss) else None, state=None if math.isfinite(loss) else optuna.trial.TrialState.FAIL)
        if best is None or loss < best[1]:
            best = bias, loss
    assert best is not None
    return best

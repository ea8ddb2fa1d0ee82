#!/usr/bin/env bash
# One trial that is a thousand times worse than the others, in a search by a Gaussian process.
#
# A good engineer would guess that one bad value among 40 does little, at least where the objective is its logarithm. GPSampler
# standardises values by their mean and standard deviation, so one value far off squeezes all others together: the same search
# ends a hundred or more times farther above the optimum than without the accident, logged or not. (Takes some minutes.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet optuna==5.0.0 scipy==1.17.1 torch==2.13.0
venv/bin/python - <<'PYTHON'
import math
import sys
import warnings

import numpy as np
import optuna

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 0.2, "d": 0.05, "e": 0.02}


def gap(seed: int, *, factor: float, logged: bool) -> float:
    """Return by how much the best of 40 trials is above the optimum, relative; the sixth trial is ``factor`` times as bad."""
    signs = dict(zip(WEIGHTS, np.random.default_rng(seed).choice([-1.0, 1.0], len(WEIGHTS)), strict=True))

    def objective(trial: optuna.Trial) -> float:
        far = sum(weight * (trial.suggest_float(name, -1, 1) - 0.3 * signs[name]) ** 2 for name, weight in WEIGHTS.items())
        loss = 40 * math.exp(0.2 * far) * (factor if trial.number == 5 else 1.0)
        return math.log(loss) if logged else loss

    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=5, deterministic_objective=True))
    study.enqueue_trial(dict.fromkeys(WEIGHTS, 0.0))
    study.optimize(objective, n_trials=40)
    return (math.exp(study.best_value) if logged else study.best_value) / 40 - 1


seeds = range(2)
print("optuna", optuna.__version__)
medians = {}
for name, factor, logged in (("none", 1.0, True), ("raw", 1000.0, False), ("logged", 1000.0, True)):
    gaps = [gap(seed, factor=factor, logged=logged) for seed in seeds]
    medians[name] = float(np.median(gaps))
    print(f"above the optimum, bad trial: {name:7s}", " ".join(f"{value:.5f}" for value in gaps))
sys.exit(0 if min(medians["raw"], medians["logged"]) > 10 * medians["none"] else 1)
PYTHON

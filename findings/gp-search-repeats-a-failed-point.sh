#!/usr/bin/env bash
# What a Gaussian-process search proposes after a trial that failed.
#
# A good engineer would guess that a sampler avoids a point whose evaluation has just failed, or at least moves elsewhere.
# GPSampler models completed trials only, and without new data its acquisition function has the same maximum: the next proposal is
# the failed point again, to three digits, as often as it fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet optuna==5.0.0 scipy==1.17.1 torch==2.13.0
venv/bin/python - <<'PYTHON'
import sys
import warnings

import optuna
from optuna.trial import TrialState

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
NAMES = "abc"


def objective(trial: optuna.Trial) -> float:
    at = [trial.suggest_float(name, -1, 1) for name in NAMES]
    if trial.number in (12, 13, 14):
        raise ArithmeticError("diverged")
    return sum((x - 0.3) ** 2 for x in at)


print("optuna", optuna.__version__)
repeated = 0
for seed in range(4):
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=5, deterministic_objective=True))
    study.optimize(objective, n_trials=16, catch=(ArithmeticError,))
    failed = [trial for trial in study.trials if trial.state is TrialState.FAIL]
    after = study.trials[15]
    for trial in (*failed, after):
        print(f"seed {seed} trial {trial.number} {trial.state.name:8s}", " ".join(f"{trial.params[name]:+.4f}" for name in NAMES))
    repeated += all(abs(after.params[name] - failed[0].params[name]) < 2e-3 for name in NAMES)
print("searches that propose the failed point again:", repeated, "of 4")
sys.exit(0 if repeated >= 3 else 1)
PYTHON

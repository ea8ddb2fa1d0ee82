"""Names of allocators in files of earlier versions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lowrank_core.allocation import allocator_named, current_name, with_current_names
from lowrank_core.config import SearchConfig
from lowrank_core.runs import recorded_run
from lowrank_core.runs.client import results
from lowrank_core.search.study import _enqueue_baselines
from lowrank_core.studies.naming import model_name, trial_label
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.space import Baseline
from lowrank_core.studio.compare.comparison import comparisons


@pytest.mark.parametrize(
    ("name", "today"),
    [
        ("marginal", "lagrangian"),
        ("marginal, healed by distill", "lagrangian, healed by distill"),
        ("marginal 0.400000", "lagrangian 0.400000"),
        ("marginally", "marginally"),
        ("trial 3", "trial 3"),
        ("lagrangian", "lagrangian"),
    ],
)
def test_a_name_of_an_earlier_version_becomes_today_s(name: str, today: str):
    assert current_name(name) == today


def test_an_allocator_is_known_by_both():
    assert allocator_named("marginal") is allocator_named("lagrangian")


def test_requests_and_results_have_today_s_names():
    body = {"label": "marginal", "trial": "marginal", "time": 1.0, "arguments": {"trial": "marginal", "prompt": "marginal"}}
    assert with_current_names(body) == {
        **body,
        "label": "lagrangian",
        "trial": "lagrangian",
        "arguments": {"trial": "lagrangian", "prompt": "marginal"},
    }


def test_the_recorded_run_is_read_with_today_s_names():
    run = recorded_run()
    assert run is not None
    trials, bodies = read_trials(run), results(run)
    assert trial_label(trials[2]) == "Lagrangian (equal slopes) (trial 2)"
    assert trials[2].label == "lagrangian"
    assert not [body for body in bodies if "marginal" in (body.get("label"), body.get("trial"))]
    assert model_name("lagrangian", trials) in {comparison.name for comparison in comparisons(bodies, trials)}


@pytest.mark.parametrize("key", ["marginal 0.400000", "lagrangian 0.400000"])
def test_a_baseline_of_an_old_study_is_not_queued_again(key: str):
    study = optuna.create_study()
    label = key.split()[0]
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=0.1, user_attrs={"label": label, "baseline": key}))
    space: Any = SimpleNamespace(
        baselines=lambda: (Baseline("lagrangian", {"qk": 1.0}, None, 0.4), Baseline("uniform", {"qk": 0.5}, None, 0.4)),
        first_points=lambda config: (),
    )
    _enqueue_baselines(study, SearchConfig(0.4), space)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [trial.user_attrs["baseline"] for trial in waiting] == ["uniform 0.400000"]

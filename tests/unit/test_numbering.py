"""A search whose workers were killed proposes what it would have proposed, whatever its sampler."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from lowrank_core.config import SAMPLERS, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import RunError
from lowrank_core.runs import Run, create_run
from lowrank_core.search.samplers import GIVEN, PointSampler
from lowrank_core.search.study import enqueue_allocation, requeue_lost
from lowrank_core.studies.numbering import RETRY_OF, place_of, without_losses
from lowrank_core.studies.storage import open_storage

SPACE = {name: FloatDistribution(0.5, 2.0, log=True) for name in ("a", "b", "c")}
Point = Mapping[str, float]


def search(run: Run, sampler: str, points: int, kills: Mapping[int, int]) -> list[Point]:
    """Draw ``points`` points, each measured before the next is drawn.

    Args:
        kills: how many variables of the point with this index are drawn when its worker is killed; it is resumed at once.
    """
    study = optuna.create_study(storage=open_storage(run), study_name=run.study_name)
    result: list[Point] = []
    left = dict(kills)
    enqueue_allocation(study, {"u": 1}, label="uniform")
    while len(result) < points:
        study.sampler = PointSampler(SearchConfig(sampler=sampler, startup_trials=4, seed=1), SPACE)
        requeue_lost(run, study)
        trial = study.ask()
        if trial.user_attrs.get(GIVEN):
            study.tell(trial, 0.7)
            continue
        drawn = left.pop(len(result), None)
        for name, bounds in list(SPACE.items())[:drawn]:
            trial.suggest_float(name, bounds.low, bounds.high, log=bounds.log)
        if drawn is not None:
            continue  # killed: it stays a running trial whose worker has not even said its name
        result.append(dict(trial.params))
        study.tell(trial, sum((value - 1.2) ** 2 for value in trial.params.values()) + 0.1)
    return result


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Run]:
    config = RunConfig(ModelSource("demo"), TextConfig("stdlib"), search=SearchConfig())
    return create_run(config, path=tmp_path / "whole"), create_run(config, path=tmp_path / "killed")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_search_proposes_the_same_points(runs: tuple[Run, Run], sampler: str):
    """While a point is half drawn, and when it is drawn and measured: in the random start and later, once and again."""
    whole = search(runs[0], sampler, 14, {})
    assert search(runs[1], sampler, 14, {1: 3, 2: 1, 6: 3, 7: 2, 11: 3}) == whole


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_point_whose_worker_was_killed_before_it_was_drawn_is_drawn_again(runs: tuple[Run, Run], sampler: str):
    whole = search(runs[0], sampler, 12, {})
    assert search(runs[1], sampler, 12, {0: 0, 3: 0, 8: 0, 10: 3}) == whole


def test_a_study_s_state_of_cma_es_names_nothing_but_itself(runs: tuple[Run, Run], tmp_path: Path):
    """Optuna keeps it pickled, and would call whatever a study from elsewhere names."""
    study = optuna.create_study()
    study.sampler = PointSampler(SearchConfig(sampler="cmaes", seed=1), SPACE)
    mark = tmp_path / "called"
    state = pickle.dumps(_Called(mark)).hex()
    params = dict.fromkeys(SPACE, 1.0)
    study.add_trial(create_trial(value=1.0, params=params, distributions=dict(SPACE), system_attrs={"cma:optimizer:0": state}))
    with pytest.raises(RunError, match=r"the state of CMA-ES in trial 0 of the study is not one: it names .*--sampler"):
        study.ask(dict(SPACE))
    assert not mark.exists()


@dataclass(frozen=True)
class _Called:
    """Leaves a mark when it is unpickled."""

    mark: Path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_places_pass_over_what_was_lost():
    study = optuna.create_study()
    for attributes, value in (({}, 1.0), ({}, None), ({}, 2.0), ({RETRY_OF: 1}, None), ({RETRY_OF: 3}, 3.0), ({}, 4.0)):
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, value=value, user_attrs=attributes))
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=5.0, system_attrs={"failed_trial": 5, "retry_history": [5]}))
    trials = study.get_trials()
    assert [place_of(trial, trials) for trial in trials] == [0, 1, 2, 1, 1, 3, 3]
    assert [(trial.number, trial.value) for trial in without_losses(trials)] == [(0, 1.0), (1, 3.0), (2, 2.0), (3, 5.0)]
    assert [trial.number for trial in study.get_trials()] == list(range(7))  # the study is as it was


def test_a_trial_that_diverged_keeps_its_place():
    study = optuna.create_study()
    for state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE):
        study.add_trial(create_trial(state=state, value=None if state == TrialState.FAIL else 1.0, user_attrs={"error": "NaN"}))
    assert [trial.number for trial in without_losses(study.get_trials())] == [0, 1, 2]

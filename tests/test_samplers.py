"""What a sampler sees of a study, and that what it proposes depends on nothing else."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lowrank_core.config import SAMPLERS, SearchConfig
from lowrank_core.search.samplers import ESTIMATE, GIVEN, PointSampler, _Points, phase

SPACE = {name: FloatDistribution(0.5, 2.0, log=True) for name in ("a", "b", "c")}


def trial(value: float | None = None, *, state: TrialState = TrialState.COMPLETE, point: float = 1.0, **attributes: object) -> FrozenTrial:
    given = GIVEN in attributes
    params = {} if given else dict.fromkeys(SPACE, point)
    return create_trial(state=state, value=value, params=params, distributions={} if given else dict(SPACE), user_attrs=attributes)


def study_of(*trials: FrozenTrial) -> optuna.Study:
    study = optuna.create_study()
    study.add_trials(trials)
    return study


def test_a_sampler_sees_points_with_the_logarithms_of_their_losses():
    study = study_of(
        trial(0.01),
        trial(5.0, **{GIVEN: True}),
        trial(state=TrialState.PRUNED, **{ESTIMATE: 0.04}),
        trial(state=TrialState.PRUNED),
        trial(state=TrialState.FAIL),
    )
    seen = _Points(study, logarithms=True)._get_trials(states=(TrialState.COMPLETE,))
    assert [(t.number, t.value) for t in seen] == [(0, math.log(0.01)), (2, math.log(0.04))]
    plain = _Points(study, logarithms=False).get_trials(states=(TrialState.COMPLETE,))
    assert [t.value for t in plain] == [0.01, 0.04]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED", "FAIL"]  # the study is as it was
    assert study.trials[0].value == 0.01


def test_a_loss_of_nothing_has_a_logarithm():
    (seen,) = _Points(study_of(trial(-1e-12)), logarithms=True)._get_trials()
    assert math.isfinite(seen.value or math.nan)


def proposals(sampler: str, study: optuna.Study, count: int = 6, seed: int = 0) -> list[dict[str, float]]:
    study.sampler = PointSampler(SearchConfig(sampler=sampler, startup_trials=3, seed=seed), SPACE)
    found = []
    for _ in range(count):
        asked = study.ask(dict(SPACE))
        found.append(asked.params)
        study.tell(asked, sum((value - 1.2) ** 2 for value in asked.params.values()) + 0.1)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_depend_on_the_seed_and_the_trials_before_alone(sampler: str):
    first = proposals(sampler, study_of(trial(0.3)))
    assert proposals(sampler, study_of(trial(0.3))) == first
    assert proposals(sampler, study_of(trial(0.3)), seed=1) != first
    assert len({tuple(point.values()) for point in first}) == 6
    assert all(0.5 <= value <= 2 for point in first for value in point.values())
    assert all(len(set(point.values())) == 3 for point in first)  # no variable copies another


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_what_was_given_does_not_move_a_proposal(sampler: str):
    """A trial that is no point keeps its number, and so its seed; its value must not matter."""
    few, many = (study_of(trial(0.3), trial(loss, **{GIVEN: True}), trial(0.4, point=1.5)) for loss in (0.001, 1000.0))
    assert proposals(sampler, few) == proposals(sampler, many)


def test_a_trial_that_was_stopped_early_teaches_the_gaussian_process():
    stopped = [trial(state=TrialState.PRUNED, point=p, **{ESTIMATE: value}) for p, value in ((0.6, 3.0), (1.4, 0.2), (1.9, 1.0))]
    ignored = [trial(state=TrialState.PRUNED, point=p) for p in (0.6, 1.4, 1.9)]
    learnt, not_learnt = proposals("gp", study_of(*stopped), count=1), proposals("gp", study_of(*ignored), count=1)
    assert learnt != not_learnt


def test_the_phase_is_told_in_words():
    config = SearchConfig(sampler="gp", startup_trials=3)
    assert (phase(config, 2), phase(config, 3)) == ("random start", "Gaussian process")
    assert phase(SearchConfig(sampler="qmc"), 0) == "quasi-random"

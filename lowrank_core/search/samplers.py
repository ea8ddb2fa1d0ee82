"""Samplers of a search, and the trials that each may use.

Every trial is drawn by a sampler of its own, seeded by the search's seed and the trial's place, which no kill shifts: what a search
proposes depends on the seed and on the finished trials alone, so one that was stopped or killed, and resumed, proposes what it would
have proposed anyway.
Allocations that are no points of the space (manual ones, some baselines) are hidden from it. A search as published has a sampler
of its own (``search.improvement``).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from lowrank_core.config import SearchConfig
from lowrank_core.config.search import MIN_LOSS
from lowrank_core.search.evolution import SafeCmaEsSampler
from lowrank_core.search.improvement import next_point
from lowrank_core.studies.numbering import GIVEN, drawn_before, place_of, without_losses
from lowrank_core.studies.published import PublishedScheme

__all__ = ["ERROR", "ESTIMATE", "GIVEN", "PointSampler", "phase"]

ESTIMATE = "estimate"
"""User attribute of a trial that was stopped early: the value it would have had, by the best trial's on the same windows."""

ERROR = "error"
"""User attribute of a trial that diverged: how. A failed trial without it lost its worker."""

_RATIO = "compression_ratio"
_BOUNDED = 5  # one in so many, the worst
_STRIDE = 1_000_003  # a prime: seeds of one search don't meet those of the next


class _Sequence(QMCSampler):
    """One sequence for the whole search, whose next point is known by how many were drawn; Optuna counts those that were lost, too."""

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return cast(_Points, study).drawn


_SAMPLERS: Mapping[str, Callable[[SearchConfig, int], BaseSampler]] = MappingProxyType(
    {
        "gp": lambda config, seed: GPSampler(seed=seed, n_startup_trials=config.startup_trials, deterministic_objective=True),
        "tpe": lambda config, seed: TPESampler(seed=seed, n_startup_trials=config.startup_trials, multivariate=True, constant_liar=True),
        "cmaes": lambda config, seed: SafeCmaEsSampler(seed=seed),  # from the middle of the space: weights of 1, in theirs
        "qmc": lambda config, seed: _Sequence(seed=config.seed, scramble=True),
        "random": lambda config, seed: RandomSampler(seed=seed),
    }
)
_WITH_A_MODEL = ("gp", "tpe")


def phase(config: SearchConfig, complete: int) -> str:
    """Return the sampler's phase after ``complete`` points, in words."""
    if not config.projected and config.sampler == "gp" and complete < config.startup_trials:
        return "initial points"
    if config.sampler in _WITH_A_MODEL and complete < config.startup_trials:
        return "random start"
    return {"gp": "Gaussian process", "tpe": "TPE", "cmaes": "CMA-ES", "qmc": "quasi-random", "random": "random"}[config.sampler]


def _bounds(config: SearchConfig) -> bool:
    """Return whether the worst losses are bounded: not as published, and not over ratios, where the worst are those that remove most.

    The other samplers compare ranks.
    """
    return config.sampler == "gp" and config.projected and config.max_ratio is None


class _Points:
    """A study as a sampler sees it: every trial that ended at a point of the space has a value there, and no other trial is shown.

    A trial that was stopped early has its estimate. One that diverged, or was stopped without an estimate, has the worst loss of all
    others: where a sampler learns nothing from a point it proposes the same one again.

    With ``logarithms`` the losses are shown as their logarithms (see ``SearchConfig.models_logarithms``). Where they are ``bounded``, the
    worst fifth is shown no worse than the next (winsorised): a Gaussian process divides by the standard deviation, and one loss a hundred
    times the others' leaves them all alike, their logarithms too.
    """

    def __init__(self, study: optuna.Study, *, logarithms: bool, bounded: bool, drawn: int = 0) -> None:
        self._study, self._logarithms, self._bounded, self.drawn = study, logarithms, bounded, drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False) -> list[FrozenTrial]:
        # As Optuna's own HyperbandPruner shows its pruner a part of a study.
        trials = without_losses(self._study._get_trials(deepcopy=deepcopy, use_cache=use_cache))
        points = [trial for trial in trials if not trial.user_attrs.get(GIVEN)]
        losses = sorted(self._modelled(loss) for loss in map(_loss, points) if loss is not None)
        worst = (_bound(losses) if self._bounded else losses[-1]) if losses else None
        seen = [self._seen(trial, worst) for trial in points]
        return [trial for trial in seen if states is None or trial.state in states]

    get_trials = _get_trials

    def _seen(self, trial: FrozenTrial, worst: float | None) -> FrozenTrial:
        loss = _loss(trial)
        if worst is None or (loss is None and not _ended_badly(trial)):
            return trial
        shown = copy.copy(trial)
        shown.state = TrialState.COMPLETE
        shown.values = [*self._ratio(trial), worst if loss is None else min(worst, self._modelled(loss))]
        return shown

    def _ratio(self, trial: FrozenTrial) -> list[float]:
        """Return the ratio that was removed, the first objective: known before measuring."""
        if len(self._study.directions) == 1:
            return []
        return list(trial.values[:-1]) if trial.values else [float(trial.user_attrs[_RATIO])]

    def _modelled(self, loss: float) -> float:
        return math.log(max(loss, MIN_LOSS)) if self._logarithms else loss


def _bound(losses: Sequence[float]) -> float:
    """Return the loss, of the ascending ``losses``, that all but the worst fifth stay at or below."""
    return losses[len(losses) - 1 - len(losses) // _BOUNDED]


def _loss(trial: FrozenTrial) -> float | None:
    """Return the measured or estimated loss of a trial; None without either."""
    if trial.state == TrialState.COMPLETE:
        return float(trial.values[-1])
    if trial.state == TrialState.PRUNED and ESTIMATE in trial.user_attrs:
        return float(trial.user_attrs[ESTIMATE])
    return None


def _ended_badly(trial: FrozenTrial) -> bool:
    """Return whether a trial was measured at its point and has no value; one whose worker was lost is measured again instead."""
    diverged = trial.state == TrialState.FAIL and ERROR in trial.user_attrs and _RATIO in trial.user_attrs
    return diverged or trial.state == TrialState.PRUNED


@contextmanager
def _one_thread() -> Iterator[None]:
    """The Gaussian process works on matrices of a few dozen rows: threads only slow it down and make it less repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PointSampler(BaseSampler):
    """Sampler of points of a fixed space; by ``scheme`` for a published search."""

    def __init__(self, config: SearchConfig, space: Mapping[str, FloatDistribution], scheme: PublishedScheme | None = None) -> None:
        self._config, self._scheme = config, scheme
        self._space: dict[str, BaseDistribution] = dict(space)

    def _inner(self, place: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # `deterministic_objective`: ours is, bit for bit; and TPE's options
            return _SAMPLERS[self._config.sampler](self._config, self._seed(place))

    def _seed(self, place: int) -> int:
        return (self._config.seed * _STRIDE + place) % 2**32

    def _published(self, scheme: PublishedScheme, study: optuna.Study, place: int) -> dict[str, float]:
        """Return the next point of a search as published, from the values as they are."""
        known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        config = self._config
        return next_point(scheme, known, self._seed(place), initial=config.startup_trials, random=config.sampler == "random")

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        fixed = trial.system_attrs.get("fixed_params", {})
        if trial.user_attrs.get(GIVEN) or search_space.keys() <= fixed.keys():
            return {}
        trials = study.get_trials(deepcopy=False)
        drawn, place = drawn_before(trial, trials), place_of(trial, trials)
        view = _Points(study, logarithms=self._config.models_logarithms, bounded=_bounds(self._config), drawn=drawn)
        points = cast(optuna.Study, view)
        with _one_thread():
            if self._scheme is not None:
                return self._published(self._scheme, points, place)
            placed = copy.copy(trial)
            placed.number = place  # TPE leaves out the trial in hand by it, CMA-ES adds it to its seed
            return self._inner(place).sample_relative(points, placed, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        # A sampler of its own for each variable would draw the same number for all of them.
        order = list(self._space).index(param_name)
        place = place_of(trial, study.get_trials(deepcopy=False))
        seed = (self._config.seed * _STRIDE + place) * len(self._space) + order
        return RandomSampler(seed=seed % 2**32).sample_independent(study, trial, param_name, param_distribution)

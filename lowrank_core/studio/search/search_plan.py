"""Cost of a planned search: budget, variables, estimated time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.allocation.units import check_reachable, dense_layers, plan_units
from lowrank_core.config import RunConfig
from lowrank_core.errors import LowRankError
from lowrank_core.parameters import MatrixShape, Unit, budget_for_ratio, dense_parameters
from lowrank_core.runs import Run
from lowrank_core.studies.published import ALLOCATIONS, POOL_RATIO
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.space import SearchSpace
from lowrank_core.studio.shared.model_facts import ModelFacts, model_facts
from lowrank_core.studio.shared.run_list import all_runs

__all__ = ["Plan", "TimeEstimate", "check_budget", "time_estimate"]

_RUNS_LOOKED_AT = 8
_KEPT = ("Calibrating", "Computing spectra", "Measuring gradients")
"""Stages whose results the runs of a machine share."""
_STAGES_BEFORE = ("Loading the model", "Reading the text", *_KEPT, "Factorising", "Measuring the dense model", "Measuring error weights")
"""As the worker calls them in ``events.jsonl``."""


@dataclass(frozen=True)
class Plan:
    """Budget and variables of a search.

    Attributes:
        allowed: parameters that may be kept at the (smallest) ratio.
        least: those at the largest ratio; the same where there is one ratio.
        dense: parameters of the compressible linears.
        variables: names of the space's variables.
    """

    allowed: int
    minimum: int
    dense: int
    variables: tuple[str, ...]


def check_budget(config: RunConfig, matrices: Sequence[MatrixShape], joint: Sequence[Unit] = ()) -> Plan | None:
    """Return the plan of a search; None for an analysis.

    Raises:
        BudgetError: a ratio can't be met by the matrices that may be compressed.
        ConfigError: the space has too many variables for the sampler, more depth groups than the model has blocks, or nothing in it.
    """
    search = config.search
    if search is None:
        return None
    units = plan_units(matrices, search.compression, joint)
    dense = dense_layers(units, search.compression)
    space = SearchSpace.of(units, search, dense, None)
    ratios = [search.compression_ratio, *([] if search.max_ratio is None else [search.max_ratio])]
    for ratio in ratios:
        check_reachable(units, ratio, search.compression)
    allowed, *_, minimum = [budget_for_ratio(units, ratio) for ratio in (ratios[0], *ratios)]
    return Plan(allowed, minimum, dense_parameters(units), tuple(space.distributions()))


@dataclass(frozen=True)
class TimeEstimate:
    """Estimated duration of a search.

    Attributes:
        trials: seconds of all its trials.
        before: seconds until the first of them, in the run that was gone by, without what is kept of it on this machine; None where it did
            not tell.
        basis: what was gone by, in words.
        selecting: upper bound in seconds for selecting windows as published; they come before the first trial, on top.
    """

    trials: float
    before: float | None
    basis: str
    selecting: float = 0.0


def time_estimate(config: RunConfig, facts: ModelFacts | None = None) -> TimeEstimate | None:
    """Return the estimated duration by the newest run with measured trials; None without one.

    Median seconds per token there x tokens of a trial here x trials. Runs of the same model, on the same text and windows, come first; then
    those of the same model; then any other, scaled by the parameters of the two models (``facts`` are those of this one). A run that ships
    with the package comes last in each: it was measured on another machine.
    """
    search = config.search
    if search is None:
        return None
    tokens = _windows(config) * (config.text.context - 1) * search.trials
    looked_at = ALLOCATIONS * round(POOL_RATIO * search.selected_windows) * (config.text.context - 1)
    measured = [result for run in _searched() if (result := _measured(run)) is not None]
    mine = _asked(config)
    for alike, scaled, words in (
        (lambda run: _asked(run.config) == mine, False, "trials of the same model, text and windows"),
        (lambda run: run.config.model.reference == config.model.reference, False, "trials of the same model, scaled by tokens"),
        (lambda run: facts is not None, True, "trials of another model, scaled by tokens and parameters"),
    ):
        for run, rate in measured:
            factor = _size_ratio(run, facts) if scaled else 1.0
            if alike(run) and factor is not None:
                elsewhere = ", on another machine" if run.recorded else ""
                before = None if scaled else _before(run, config)
                return TimeEstimate(rate * factor * tokens, before, f"{words}{elsewhere}", rate * factor * looked_at)
    return None


def _searched() -> list[Run]:
    """Return the newest runs with a search, bundled ones last."""
    result = [run for run in all_runs() if run.config.search is not None]
    own = [run for run in result if not run.recorded]
    return own[:_RUNS_LOOKED_AT] + [run for run in result if run.recorded]


def _windows(config: RunConfig) -> int:
    """Return how many windows a trial sees."""
    selected = config.search.selected_windows if config.search is not None else 0
    return selected or config.text.validation_windows


def _asked(config: RunConfig) -> tuple[str, str, int, int]:
    return config.model.reference, config.text.reference, _windows(config), config.text.context


def _measured(run: Run) -> tuple[Run, float] | None:
    """Return the run and its median seconds per token; None where nothing was measured."""
    try:
        trials = read_trials(run)
    except LowRankError:
        return None
    rates = [t.seconds / t.tokens for t in trials if t.finished and t.seconds is not None and t.tokens]
    return (run, statistics.median(rates)) if rates else None


def _size_ratio(run: Run, facts: ModelFacts | None) -> float | None:
    """Return the parameter ratio of the model of ``facts`` to the run's; None if unknown."""
    try:
        theirs = model_facts(run)
    except LowRankError:
        return None
    return None if facts is None or theirs is None or not theirs.parameters else facts.parameters / theirs.parameters


def _before(run: Run, config: RunConfig) -> float | None:
    """Return the seconds of the stages before trials, without cached ones."""
    theirs = run.config
    kept = not run.recorded and (theirs.model, theirs.text, theirs.calibration) == (config.model, config.text, config.calibration)
    took = run.stage_seconds()
    result = [took[stage] for stage in _STAGES_BEFORE if stage in took and not (kept and stage in _KEPT)]
    return sum(result) if result else None

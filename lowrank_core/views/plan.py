"""What a search that is about to start will cost: its budget, its variables, and roughly its time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.accounting import HeadUnit, MatrixShape, budget_for_ratio, dense_parameters
from lowrank_core.config import RunConfig
from lowrank_core.errors import LowRankError
from lowrank_core.runs import list_runs
from lowrank_core.search.records import read_trials
from lowrank_core.search.space import SearchSpace
from lowrank_core.units import check_reachable, plan_units, value_layers

__all__ = ["Plan", "check_budget", "estimated_seconds"]

_RUNS_LOOKED_AT = 8


@dataclass(frozen=True)
class Plan:
    """What a search has to spend, and over what it searches.

    Attributes:
        allowed: parameters that may be kept at the (smallest) ratio.
        least: those at the largest ratio; the same where there is one ratio.
        dense: parameters of the compressible linears.
        variables: names of the space's variables.
    """

    allowed: int
    least: int
    dense: int
    variables: tuple[str, ...]


def check_budget(config: RunConfig, matrices: Sequence[MatrixShape], heads: Sequence[HeadUnit] = ()) -> Plan | None:
    """Return the plan of a search that is about to start; None if it only analyses.

    Raises:
        BudgetError: a ratio can't be met by the matrices that may be compressed.
        ConfigError: the space has too many variables for the sampler, more depth groups than the model has blocks, or nothing in it.
    """
    search = config.search
    if search is None:
        return None
    units = plan_units(matrices, search.compression, heads)
    dense = value_layers(matrices) if search.compression.value_dense else ()
    space = SearchSpace.of(units, search, dense, None)
    ratios = [search.compression_ratio, *([] if search.most_ratio is None else [search.most_ratio])]
    for ratio in ratios:
        check_reachable(units, ratio, search.compression)
    allowed, *_, least = [budget_for_ratio(units, ratio) for ratio in (ratios[0], *ratios)]
    return Plan(allowed, least, dense_parameters(units), tuple(space.distributions()))


def estimated_seconds(config: RunConfig) -> float | None:
    """Return how long the trials of a search may take, by the newest run on this machine that measured trials of the same model.

    Median seconds per token there × tokens of a trial here × trials: an estimate, None where there is nothing to go by.
    """
    search = config.search
    if search is None:
        return None
    tokens = config.text.validation_windows * (config.text.context - 1)
    rate = _seconds_per_token(config.model.reference)
    return None if rate is None else rate * tokens * search.trials


def _seconds_per_token(model: str) -> float | None:
    alike = [run for run in list_runs() if run.config.search is not None and run.config.model.reference == model]
    for run in alike[:_RUNS_LOOKED_AT]:
        try:
            trials = read_trials(run)
        except LowRankError:
            continue
        rates = [t.seconds / t.tokens for t in trials if t.finished and t.seconds is not None and t.tokens]
        if rates:
            return statistics.median(rates)
    return None

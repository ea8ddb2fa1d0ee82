"""Objectives of trials, on search-validation windows only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import WindowScores

__all__ = ["OBJECTIVE_FUNCTIONS", "objective_value"]

_PAPER_WEIGHT = 1e-3


def _kl(scores: WindowScores, context: int) -> float:
    assert scores.kl is not None
    return float(scores.kl.mean())


def _perplexity(scores: WindowScores, context: int) -> float:
    return math.exp(float(scores.nll.mean()))


def _bolaco(scores: WindowScores, context: int) -> float:
    """Perplexity + 1e-3 · KL(compressed ‖ dense), summed over the tokens of a window and averaged over windows (arXiv 2405.10616, §3.2).

    So the mean KL per token has the weight 1e-3 · context, however many windows there are. The published code sums over the last token
    of a window, too, after which nothing is predicted; here it counts as much as the mean of the others.
    """
    assert scores.reverse_kl is not None
    return _perplexity(scores, context) + _PAPER_WEIGHT * context * float(scores.reverse_kl.mean())


OBJECTIVE_FUNCTIONS: Mapping[str, Callable[[WindowScores, int], float]] = MappingProxyType(
    {"kl": _kl, "perplexity": _perplexity, "bolaco": _bolaco}
)


def objective_value(name: str, scores: WindowScores, context: int) -> float:
    """Return the value to minimise; ``context`` is the count of tokens in a window.

    Raises:
        NumericalError: it is not finite.
    """
    try:
        value = OBJECTIVE_FUNCTIONS[name](scores, context)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise NumericalError(f"the objective {name} is not finite at this allocation: the compressed model diverged.")
    return value

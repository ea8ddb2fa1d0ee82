"""What a trial is judged by, on search-validation windows only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import WindowScores

__all__ = ["OBJECTIVE_FUNCTIONS", "objective_value"]

_PAPER_WEIGHT = 1e-3


def _kl(scores: WindowScores, tokens: int) -> float:
    assert scores.kl is not None
    return float(scores.kl.mean())


def _perplexity(scores: WindowScores, tokens: int) -> float:
    return math.exp(float(scores.nll.mean()))


def _bolaco(scores: WindowScores, tokens: int) -> float:
    """Perplexity + 1e-3 · reverse KL summed over the tokens (Bolaco, arXiv 2405.10616, §3.2)."""
    assert scores.reverse_kl is not None
    return _perplexity(scores, tokens) + _PAPER_WEIGHT * float(scores.reverse_kl.mean()) * tokens


OBJECTIVE_FUNCTIONS: Mapping[str, Callable[[WindowScores, int], float]] = MappingProxyType(
    {"kl": _kl, "perplexity": _perplexity, "bolaco": _bolaco}
)


def objective_value(name: str, scores: WindowScores, tokens: int) -> float:
    """Return the value to minimise; ``tokens`` is the count of predicted tokens.

    Raises:
        NumericalError: it is not finite.
    """
    try:
        value = OBJECTIVE_FUNCTIONS[name](scores, tokens)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise NumericalError(f"the objective {name} is not finite at this allocation: the compressed model diverged.")
    return value

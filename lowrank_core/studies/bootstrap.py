"""Bootstrap intervals over windows of text. Torch-free: pages draw them for searches, evaluations for reports."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["bootstrap_interval"]

_BOOTSTRAP_SAMPLES = 2000
_ROUNDING = 1e-12
"""Relative width of an interval that rounding alone makes, in float64."""


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, counts: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of ``statistic`` of the mean row, resampling rows (n,) or (n, k) of ``counts`` (n,) tokens.

    The mean of a draw is weighted by the counts, so it is a ratio of sums where they differ (Efron & Tibshirani, An Introduction to the
    Bootstrap, ch. 13). None where nothing was seen of the spread: a single row, or rows that do not differ in ``statistic``. The interval
    would have no width, and read as certainty.
    """
    if len(rows) < 2:
        return None
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(rows), size=(_BOOTSTRAP_SAMPLES, len(rows)))
    if counts is None:
        means = rows[drawn].mean(axis=1)
    else:
        weights = counts[drawn] / counts[drawn].sum(axis=1, keepdims=True)
        means = np.einsum("sn,sn...->s...", weights, rows[drawn])
    low, high = np.quantile(statistic(means), [0.025, 0.975])
    return (float(low), float(high)) if high - low > _ROUNDING * max(abs(low), abs(high)) else None

"""Random-matrix bulk and heavy-tail exponent of a spectrum. Numpy only.

Notation::

    σ_i²    eigenvalues of W Wᵀ, W (m, n); M = min(m, n), N = max(m, n), q = M / N
    s²      mean square of the entries of W, Σ σ² / (m n)
    x       σ² / (N s²), whose mean over the M eigenvalues is 1
    x±      edges of the bulk, (1 ± √q)²                             Marchenko & Pastur 1967
    ρ(x)    its density, √((x₊ - x)(x - x₋)) / (2π q x)
    μ, τ    (√(N-1) + √M)², √μ (1/√(N-1) + 1/√M)^⅓: centre and scale of the largest eigenvalue over s² of a random matrix; from them
            it lies as far as the Tracy-Widom law says              Johnstone 2001, Theorem 1.1
    α       exponent of a density p(λ) ∝ λ^-α for λ >= λ_min         Clauset, Shalizi & Newman 2009, Eq. 3.1
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_core.types import Vector

__all__ = ["MIN_TAIL", "TailFit", "bulk_density", "bulk_edges", "entry_variance", "fit_tail", "outliers"]

MIN_TAIL = 10
"""Eigenvalues that a tail must have to be fitted."""

_TRACY_WIDOM_99 = 2.0234
"""Quantile 0.99 of the Tracy-Widom law of real matrices: one random matrix in a hundred has an eigenvalue beyond."""

_CANDIDATES = 64
_ROUNDING = 1e-12  # eigenvalues below this share of the largest are rounding


def entry_variance(energies: Vector, rows: int, columns: int) -> float:
    """Return s² of a matrix (rows, columns) from its squared singular values."""
    return float(energies.sum()) / (rows * columns)


def bulk_edges(aspect: float) -> tuple[float, float]:
    """Return x₋ and x₊ for q = ``aspect`` in (0, 1]."""
    return (1 - aspect**0.5) ** 2, (1 + aspect**0.5) ** 2


def bulk_density(x: Vector, aspect: float) -> Vector:
    """Return ρ(x) of the Marchenko-Pastur law for q = ``aspect`` in (0, 1]; 0 outside the bulk."""
    low, high = bulk_edges(aspect)
    inside = (x > low) & (x < high)
    safe = np.where(inside, x, 1.0)
    return np.where(inside, np.sqrt(np.maximum((high - safe) * (safe - low), 0.0)) / (2 * np.pi * aspect * safe), 0.0)


def outliers(energies: Vector, rows: int, columns: int) -> int:
    """Return how many squared singular values lie beyond s² (μ + 2.02 τ): the bulk's edge and what it fluctuates by at this size.

    s² is that of all entries, outliers included: a few strong ones hide weaker ones, never the other way round.
    """
    minimum, maximum = min(rows, columns), max(rows, columns)
    roots = np.sqrt(maximum - 1) + np.sqrt(minimum)
    scale = roots * (1 / np.sqrt(max(1, maximum - 1)) + 1 / np.sqrt(minimum)) ** (1 / 3)
    limit = entry_variance(energies, rows, columns) * (roots**2 + _TRACY_WIDOM_99 * scale)
    return int((energies > limit).sum()) if limit > 0 else 0


@dataclass(frozen=True)
class TailFit:
    """A power law fitted to the largest eigenvalues.

    Attributes:
        alpha: the exponent.
        error: its standard error, (α - 1) / √count.
        least: λ_min, the smallest eigenvalue of the tail.
        count: eigenvalues in the tail, of ``total``.
        distance: largest distance between the tail's distribution and the fitted one (Kolmogorov-Smirnov), in [0, 1].
    """

    alpha: float
    error: float
    minimum: float
    count: int
    total: int
    distance: float


def fit_tail(eigenvalues: Vector) -> TailFit | None:
    """Return the power law of the tail of descending ``eigenvalues``, by maximum likelihood; None where there is none to fit.

    λ_min is the eigenvalue whose tail is nearest to its power law in the Kolmogorov-Smirnov distance (Clauset, Shalizi & Newman 2009,
    §3.3), as users of WeightWatcher (Martin, Peng & Mahoney 2021) know α. Of long spectra 64 log-spaced tails are compared. Undefined
    for fewer than 10 positive eigenvalues, and where they are all equal.
    """
    positive = eigenvalues[eigenvalues > _ROUNDING * eigenvalues.max(initial=0.0)]
    if positive.size < MIN_TAIL:
        return None
    logs = np.log(positive)
    counts = np.unique(np.geomspace(MIN_TAIL, positive.size, min(_CANDIDATES, positive.size)).round().astype(np.int64))
    fits = [fit for count in counts if (fit := _fitted(logs, int(count), int(eigenvalues.size))) is not None]
    return min(fits, key=lambda fit: fit.distance, default=None)


def _fitted(logs: Vector, count: int, total: int) -> TailFit | None:
    excess = logs[:count] - logs[count - 1]
    mean = float(excess.mean())
    if not mean > _ROUNDING:
        return None
    beyond = np.exp(-excess / mean)  # P(λ >= λ_i) under the fit, ascending in i
    steps = np.arange(count + 1) / count
    distance = float(np.maximum(np.abs(beyond - steps[1:]), np.abs(beyond - steps[:-1])).max())
    return TailFit(1 + 1 / mean, 1 / (mean * count**0.5), float(np.exp(logs[count - 1])), count, total, distance)

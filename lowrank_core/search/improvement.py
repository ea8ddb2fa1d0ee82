"""Proposals of a published search: maximum expected improvement among points that meet the budget.

As the published code's optimiser (OpenBox) does it: a Gaussian process with a Matérn-5/2 kernel, one length scale for each variable,

    k(x, x') = a·M(√Σ_j (x_j - x'_j)²/l_j²) + b·[x = x'],    M(d) = (1 + √5 d + 5d²/3) exp(-√5 d),

on values scaled to mean 0 and deviation 1 (the values themselves, no logarithms), a, b and l at the most likely values under its priors:
log-normal for a, horseshoe for b. The improvement that it expects is compared at 5,000 points: those where a local search from the ten best
points known ends, and random ones. All of them meet the budget. One trial in ten is random, and so is every trial that comes before the
initial ones are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import fmin_l_bfgs_b
from scipy.stats import norm

from lowrank_core.studies.published import MAX, MIN, PublishedScheme

__all__ = ["RANDOM_SHARE", "GaussianProcess", "next_point"]

Array = npt.NDArray[np.float64]

RANDOM_SHARE = 0.1
"""Of the trials after the initial ones."""

_POINTS, _STARTS = 5000, 10
_NEIGHBOURS, _SPREAD = 4, 0.2  # of each variable, in the unit cube
_RESTARTS = 10
_AMPLITUDE, _LENGTH, _NOISE = (-10.0, 2.0), (-6.754111155189306, 0.0858637988771976), (-25.0, 2.0)
"""Bounds of the logarithms of a, l and b."""
_START = (np.log(2.0), 0.0, np.log(1e-8))
_HORSESHOE = 0.1
_BAD = 1e25
_MIN_VARIANCE = 1e-10


def next_point(scheme: PublishedScheme, trials: Sequence[FrozenTrial], seed: int, *, initial: int, random: bool) -> dict[str, float]:
    """Return the next point to measure.

    Args:
        trials: that have a point and a value; the lowest is best.
        seed: of this trial.
        initial: points before the process takes over.
        random: draw every point.

    Raises:
        BudgetError: no point meets the budget.
    """
    generator = np.random.default_rng([seed, 1])
    known = np.array([[trial.params[name] for name in scheme.groups] for trial in trials]).reshape(len(trials), len(scheme.groups))
    if random or len(trials) < initial or generator.random() < RANDOM_SHARE:
        return scheme.point(scheme.draw(generator, 1)[0])
    values = np.array([float(trial.value or 0.0) for trial in trials])
    process = GaussianProcess.fitted((known - MIN) / (MAX - MIN), values, generator)
    ends = _local_searches(scheme, process, known, generator)
    candidates = np.concatenate([scheme.draw(generator, _POINTS - len(ends)), ends])
    order = np.argsort(-process.improvement((candidates - MIN) / (MAX - MIN)), kind="stable")
    new = next((index for index in order if not (candidates[index] == known).all(axis=1).any()), None)
    return scheme.point(scheme.draw(generator, 1)[0] if new is None else candidates[new])


def _local_searches(scheme: PublishedScheme, process: GaussianProcess, known: Array, generator: np.random.Generator) -> Array:
    """Return the ends of local searches from the ten known points of largest expected improvement (starts, groups)."""
    improvement = process.improvement((known - MIN) / (MAX - MIN))
    best = np.argsort(-improvement, kind="stable")[:_STARTS]
    return np.stack([_climbed(scheme, process, known[index], generator) for index in best])


def _climbed(scheme: PublishedScheme, process: GaussianProcess, point: Array, generator: np.random.Generator) -> Array:
    """Move to the first better neighbour until none of the drawn ones is."""
    height = process.improvement((point[None] - MIN) / (MAX - MIN))[0]
    while True:
        around = _neighbours(point, generator)
        around = around[scheme.meets(around)]
        heights = process.improvement((around - MIN) / (MAX - MIN))
        better = np.flatnonzero(heights > height)
        if not len(better):
            return point
        point, height = around[better[0]], heights[better[0]]


def _neighbours(point: Array, generator: np.random.Generator) -> Array:
    """Return points (4·groups, groups) that differ from ``point`` in one variable, in random order; those outside the bounds left out."""
    result = np.repeat(point[None], _NEIGHBOURS * len(point), axis=0)
    variable = np.repeat(np.arange(len(point)), _NEIGHBOURS)
    result[np.arange(len(result)), variable] += generator.normal(scale=_SPREAD * (MAX - MIN), size=len(result))
    return generator.permutation(result[((result >= MIN) & (result <= MAX)).all(axis=1)])


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process after its observations.

    Attributes:
        points: (n, d), in the unit cube; values: (n,), scaled to mean 0 and deviation 1.
        theta: logarithms of a, l_1, …, l_d and b.
    """

    points: Array
    values: Array
    theta: Array

    @classmethod
    def fitted(cls, points: Array, values: Array, generator: np.random.Generator) -> GaussianProcess:
        """Return the process at its most likely kernel, the best of eleven searches."""
        deviation = float(values.std()) or 1.0
        scaled = (values - values.mean()) / deviation
        bounds = [_AMPLITUDE, *[_LENGTH] * points.shape[1], _NOISE]
        starts = [_first_theta(points.shape[1]), *_random_thetas(points.shape[1], generator)]
        result = [fmin_l_bfgs_b(_loss, np.clip(s, *np.transpose(bounds)), args=(points, scaled), bounds=bounds) for s in starts]
        return cls(points, scaled, min(result, key=lambda end: float(end[1]))[0])

    def improvement(self, points: Array) -> Array:
        """Return the expected improvement of ``points`` (m, d) over the lowest known value (m,)."""
        lower, weights = self._solved
        between = _kernel(self.theta, self.points, points)
        mean = between.T @ weights
        explained = solve_triangular(lower, between, lower=True)
        variance = np.exp(self.theta[0]) + np.exp(self.theta[-1]) - (explained**2).sum(axis=0)
        deviation = np.sqrt(np.maximum(variance, _MIN_VARIANCE))
        below = self.values.min() - mean
        result: Array = below * norm.cdf(below / deviation) + deviation * norm.pdf(below / deviation)
        return result

    @cached_property
    def _solved(self) -> tuple[Array, Array]:
        """The Cholesky factor of the covariance (n, n), and the covariance's inverse times the values (n,)."""
        covariance = _kernel(self.theta, self.points, self.points) + np.exp(self.theta[-1]) * np.eye(len(self.points))
        lower = np.linalg.cholesky(covariance)
        return lower, cho_solve((lower, True), self.values)


def _first_theta(dimensions: int) -> Array:
    return np.array([_START[0], *[_START[1]] * dimensions, _START[2]])


def _random_thetas(dimensions: int, generator: np.random.Generator) -> list[Array]:
    """Return the random starts: drawn from the priors, length scales evenly over their bounds."""
    result = []
    for _ in range(_RESTARTS):
        lengths = generator.uniform(*_LENGTH, size=dimensions)
        noise = np.log(abs(generator.normal() * abs(generator.standard_cauchy()) * _HORSESHOE) + np.exp(_NOISE[0]))
        result.append(np.array([generator.normal(), *lengths, noise]))
    return result


def _distances(theta: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Return (x_j - x'_j)²/l_j² (n, m, d), and its root summed over j (n, m)."""
    parts = ((first[:, None] - second[None]) / np.exp(theta[1:-1])) ** 2
    return parts, np.sqrt(parts.sum(axis=2))


def _kernel(theta: Array, first: Array, second: Array) -> Array:
    """Return a·M between two sets of points (n, m)."""
    _, distance = _distances(theta, first, second)
    root = np.sqrt(5.0) * distance
    result: Array = np.exp(theta[0]) * (1 + root + root**2 / 3) * np.exp(-root)
    return result


def _loss(theta: Array, points: Array, values: Array) -> tuple[float, Array]:
    """Return minus the log likelihood and the log priors, and its gradient (d + 2,)."""
    parts, distance = _distances(theta, points, points)
    root = np.sqrt(5.0) * distance
    plain = _kernel(theta, points, points)
    covariance = plain + np.exp(theta[-1]) * np.eye(len(points))
    try:
        factor = cho_factor(covariance, lower=True)
    except np.linalg.LinAlgError:
        return _BAD, np.zeros_like(theta)
    alpha = cho_solve(factor, values)
    inner = np.outer(alpha, alpha) - cho_solve(factor, np.eye(len(points)))
    by_length = np.exp(theta[0]) * (5 / 3) * (1 + root) * np.exp(-root)  # ∂k/∂log l_j over (x_j - x'_j)²/l_j²
    error_weights = [0.5 * (inner * plain).sum(), *(0.5 * np.einsum("ij,ijk->k", inner * by_length, parts))]
    error_weights.append(0.5 * np.exp(theta[-1]) * np.trace(inner))
    likelihood = -0.5 * values @ alpha - np.log(np.diag(factor[0])).sum()
    prior, prior_slopes = _priors(theta)
    return -float(likelihood + prior), -(np.array(error_weights) + prior_slopes)


def _priors(theta: Array) -> tuple[float, Array]:
    """Return the log priors of a (log-normal) and b (horseshoe), and their slopes by the logarithms (d + 2,)."""
    error_weights = np.zeros_like(theta)
    noise = np.exp(theta[-1])
    ratio = 3 * (_HORSESHOE / noise) ** 2
    error_weights[0] = -theta[0] - 1
    error_weights[-1] = -2 * ratio / ((1 + ratio) * np.log1p(ratio))
    return float(-0.5 * theta[0] ** 2 - theta[0] + np.log(np.log1p(ratio))), error_weights

"""Random matrices have no outliers and planted ones are found; exponents are recovered within their errors."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_core.spectra.heavy_tails import MIN_TAIL, bulk_density, bulk_edges, entry_variance, fit_tail, outliers


def _energies(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def _gaussian(rows: int, columns: int, seed: int, scale: float = 0.3) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(300, 300), (200, 500), (500, 200)])
def test_a_random_matrix_has_no_outliers_and_a_planted_direction_is_exactly_one(rows: int, columns: int) -> None:
    noise = _gaussian(rows, columns, seed=0)
    assert outliers(_energies(noise), rows, columns) == 0
    generator = np.random.default_rng(1)
    left, right = generator.standard_normal(rows), generator.standard_normal(columns)
    edge = 0.3 * (rows**0.5 + columns**0.5)
    spike = 1.5 * edge * np.outer(left, right) / np.linalg.norm(left) / np.linalg.norm(right)
    assert outliers(_energies(noise + spike), rows, columns) == 1


def test_without_room_for_its_fluctuation_the_edge_would_find_outliers_in_noise() -> None:
    beyond, plain = 0, 0
    for seed in range(60):
        energies = _energies(_gaussian(60, 90, seed))
        beyond += outliers(energies, 60, 90)
        plain += int((energies > entry_variance(energies, 60, 90) * 90 * bulk_edges(60 / 90)[1]).sum())
    assert plain >= 3
    assert beyond <= 2  # one in a hundred is expected


def test_the_scale_of_a_matrix_does_not_matter_and_zeros_have_no_outliers() -> None:
    spiked = _energies(_gaussian(80, 120, 2) + 0.4)
    assert outliers(spiked, 80, 120) == outliers(1e-8 * spiked, 80, 120) == 1
    assert outliers(np.zeros(5), 5, 9) == 0
    assert outliers(np.array([4.0]), 1, 1) in (0, 1)


def test_the_variance_of_the_entries_is_their_mean_square() -> None:
    matrix = _gaussian(30, 50, 3)
    assert entry_variance(_energies(matrix), 30, 50) == pytest.approx((matrix**2).mean())


@pytest.mark.parametrize("aspect", [0.1, 0.5, 1.0])
def test_the_density_integrates_to_one_with_mean_one(aspect: float) -> None:
    low, high = bulk_edges(aspect)
    x = low + (high - low) * np.linspace(0, 1, 400_001) ** 3  # dense where the density of a square matrix has its pole
    density = bulk_density(x, aspect)
    assert np.trapezoid(density, x) == pytest.approx(1, abs=2e-3)
    assert np.trapezoid(x * density, x) == pytest.approx(1, abs=2e-3)
    assert not bulk_density(np.array([low / 2 - 1e-3, high * 1.01]), aspect).any()


def test_the_density_is_that_of_the_eigenvalues_of_random_matrices() -> None:
    energies = _energies(_gaussian(600, 1200, 4, scale=1.0)) / 1200
    low, high = bulk_edges(0.5)
    middle = (low + high) / 2
    x = np.linspace(middle, high, 20_001)
    assert (energies > middle).mean() == pytest.approx(np.trapezoid(bulk_density(x, 0.5), x), abs=0.01)


def _pareto(alpha: float, count: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).pareto(alpha - 1, count) + 1)[::-1]


@pytest.mark.parametrize("alpha", [1.7, 4.0])
def test_the_exponent_of_pareto_samples_is_found_within_its_standard_error(alpha: float) -> None:
    fits = [fit for seed in range(40) if (fit := fit_tail(_pareto(alpha, 2000, seed))) is not None]
    assert len(fits) == 40
    within = [sum(abs(fit.alpha - alpha) < errors * fit.error for fit in fits) / 40 for errors in (1, 2)]
    assert 0.55 <= within[0] <= 0.85  # 68 % of a normal law
    assert within[1] >= 0.85
    assert np.mean([fit.alpha for fit in fits]) == pytest.approx(alpha, rel=0.02)
    assert fits[0].error == pytest.approx((fits[0].alpha - 1) / fits[0].count ** 0.5)
    assert max(fit.distance for fit in fits) < 0.1


def test_the_tail_is_told_from_the_bulk() -> None:
    generator = np.random.default_rng(5)
    values = np.sort(np.concatenate([generator.uniform(0.2, 3.0, 1500), 3 * _pareto(3.0, 500, 6)]))[::-1]
    fit = fit_tail(values)
    assert fit is not None
    assert 2 < fit.minimum < 4
    assert abs(fit.alpha - 3.0) < 3 * fit.error
    assert fit.total == 2000


def test_the_fit_is_maximum_likelihood_from_its_lowest_value_on() -> None:
    values = _pareto(2.2, 400, 7)
    fit = fit_tail(values)
    assert fit is not None
    tail = values[values >= fit.minimum * (1 - 1e-12)]
    assert tail.size == fit.count
    assert fit.alpha == pytest.approx(1 + tail.size / np.log(tail / fit.minimum).sum())


@pytest.mark.parametrize("values", [np.zeros(50), np.ones(50), np.arange(1.0, MIN_TAIL)[::-1], np.array([])])
def test_where_there_is_no_tail_there_is_no_exponent(values: np.ndarray) -> None:
    assert fit_tail(values) is None

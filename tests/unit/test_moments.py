import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.statistics.moments import GradientAccumulator, InputStatistics, MomentAccumulator
from lowrank_core.statistics.pooling import PooledAccumulator, trimmed

TOLERANCE = 1e-10  # float64, a few thousand additions


def rows(count: int, width: int, seed: int = 0, *, mean: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + mean


def gathered(
    windows: torch.Tensor, chunks: list[int], *, group_size: int, group_weights: str = "equal", robust: str = "none"
) -> InputStatistics:
    accumulator = PooledAccumulator(
        "layer", windows.shape[-1], group_size=group_size, group_weights=group_weights, robust=robust, windows=len(windows)
    )
    for part in windows.split(chunks):
        accumulator.update(part)
    return accumulator.finish()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_streaming_equals_two_passes_for_any_chunking(chunks: list[int]) -> None:
    data = rows(sum(chunks) + 1, 6)
    accumulator = MomentAccumulator(6)
    for part in data.split([*chunks, 1]):
        accumulator.update(part)
    np.testing.assert_allclose(accumulator.mean.numpy(), data.numpy().mean(0), rtol=TOLERANCE)
    np.testing.assert_allclose(accumulator.covariance.numpy(), np.cov(data.numpy(), rowvar=False), rtol=1e-8, atol=TOLERANCE)


def test_a_large_mean_does_not_drown_the_covariance() -> None:
    data = rows(2000, 4, mean=1e7)
    accumulator = MomentAccumulator(4)
    for part in data.split(37):
        accumulator.update(part)
    expected = np.cov(data.numpy(), rowvar=False)
    np.testing.assert_allclose(accumulator.covariance.numpy(), expected, rtol=1e-6)
    # The textbook formula E[x xᵀ] - μ μᵀ fails the same test: that is why there is a merge.
    naive = (data.T @ data) / len(data) - torch.outer(data.mean(0), data.mean(0))
    assert not np.allclose(naive.numpy(), expected, rtol=1e-6)


def test_merging_is_associative() -> None:
    parts = rows(60, 5).split(20)
    left, right = MomentAccumulator(5), MomentAccumulator(5)
    accumulators = []
    for part in parts:
        accumulators.append(MomentAccumulator(5))
        accumulators[-1].update(part)
    for other in accumulators:
        left.merge(other)
    pair = MomentAccumulator(5)
    pair.merge(accumulators[1])
    pair.merge(accumulators[2])
    right.merge(accumulators[0])
    right.merge(pair)
    torch.testing.assert_close(left.scatter, right.scatter, rtol=TOLERANCE, atol=TOLERANCE)
    assert left.count == right.count == 60


def test_one_group_pools_to_the_sample_covariance() -> None:
    windows = rows(24, 5).reshape(6, 4, 5)
    result = gathered(windows, [2, 4], group_size=6)
    assert torch.equal(result.pooled, result.sample)
    assert result.pooled_to_sample == 0


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [3, 3, 4], [7, 3]])
def test_pooling_averages_the_covariances_of_the_groups(chunks: list[int]) -> None:
    windows = rows(50, 4).reshape(10, 5, 4)
    result = gathered(windows, chunks, group_size=4)
    groups = [windows[:4], windows[4:8], windows[8:]]
    covariances = [np.cov(group.reshape(-1, 4).numpy(), rowvar=False) for group in groups]
    weights = np.array([1.0, 1.0, 0.5])  # the remainder is half a group
    np.testing.assert_allclose(result.pooled.numpy(), np.average(covariances, axis=0, weights=weights), rtol=1e-9)
    np.testing.assert_allclose(result.group_weights.numpy(), weights / weights.sum())
    np.testing.assert_allclose(result.group_traces.numpy(), [np.trace(c) for c in covariances], rtol=1e-9)
    assert result.group_counts.tolist() == [20, 20, 10]


def test_degrees_of_freedom_weigh_groups_by_their_rows() -> None:
    windows = rows(50, 4).reshape(10, 5, 4)
    result = gathered(windows, [10], group_size=4, group_weights="dof")
    groups = [windows[:4], windows[4:8], windows[8:]]
    within = sum(np.cov(g.reshape(-1, 4).numpy(), rowvar=False) * (g.shape[0] * 5 - 1) for g in groups)
    np.testing.assert_allclose(result.pooled.numpy(), within / (50 - 3), rtol=1e-9)


def test_pooling_leaves_out_what_differs_between_groups() -> None:
    windows = rows(80, 3).reshape(8, 10, 3)
    windows[4:] += 100.0
    result = gathered(windows, [8], group_size=4)
    assert float(result.sample.trace()) > 50 * float(result.pooled.trace())
    assert result.pooled_to_sample > 0.9


def test_the_second_moment_is_uncentred() -> None:
    windows = rows(30, 4).reshape(6, 5, 4)
    result = gathered(windows, [6], group_size=2)
    flat = windows.reshape(-1, 4)
    torch.testing.assert_close(result.second_moment, flat.T @ flat / len(flat), rtol=1e-10, atol=1e-10)


def test_sums_of_float32_rows_do_not_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(200_000, 2, generator=generator) + 1000
    accumulator = MomentAccumulator(2)
    for part in data.split(5000):
        accumulator.update(part)
    expected = np.cov(data.double().numpy(), rowvar=False)
    np.testing.assert_allclose(accumulator.covariance.numpy(), expected, rtol=2e-6)
    # Sums in float32 fail the same test a thousand times over: that is why blocks are summed in float64.
    total = torch.zeros(2, 2)
    for part in data.split(1000):
        total += part.T @ part
    drifted = total.double() / len(data) - torch.outer(data.double().mean(0), data.double().mean(0))
    assert not np.allclose(drifted.numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 130, 300])
def test_products_of_lower_precision_are_exact_enough(dtype: torch.dtype, width: int) -> None:
    data = (rows(2500, width) / width).to(dtype)
    accumulator = MomentAccumulator(width)
    accumulator.update(data)
    expected = np.cov(data.double().numpy(), rowvar=False)
    assert np.linalg.norm(accumulator.covariance.numpy() - expected) < 1e-6 * np.linalg.norm(expected)
    np.testing.assert_allclose(accumulator.mean.numpy(), data.double().numpy().mean(0), atol=1e-8)
    assert torch.equal(accumulator.covariance, accumulator.covariance.T)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.sampled_from(["none", "trimmed", "downweighted"]))
def test_no_chunking_of_windows_changes_the_statistics(chunks: list[int], robust: str) -> None:
    windows = rows((sum(chunks) + 9) * 3, 4).reshape(-1, 3, 4)
    windows[1, 1] *= 50
    whole = gathered(windows, [len(windows)], group_size=4, robust=robust)
    parts = gathered(windows, [*chunks, 9], group_size=4, robust=robust)
    for one, other in ((whole.pooled, parts.pooled), (whole.sample, parts.sample), (whole.mean, parts.mean)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.absolute_mean, parts.absolute_mean, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(whole.group_weights, parts.group_weights)


def test_the_mean_magnitude_is_that_of_all_rows() -> None:
    windows = rows(60, 4, mean=0).reshape(12, 5, 4)
    result = gathered(windows, [5, 7], group_size=5)
    torch.testing.assert_close(result.absolute_mean, windows.abs().mean((0, 1)), rtol=TOLERANCE, atol=0)
    assert (result.absolute_mean >= result.mean.abs()).all()


# robust pooling


def distance(result: InputStatistics, clean: InputStatistics) -> float:
    return float(torch.linalg.matrix_norm(result.pooled - clean.pooled) / torch.linalg.matrix_norm(clean.pooled))


def test_trimming_withstands_an_outlier_group() -> None:
    clean = rows(2400, 4).reshape(48, 50, 4)
    spoilt = clean.clone()
    spoilt[8:12] *= 30
    result = {rule: gathered(spoilt, [48], group_size=4, robust=rule) for rule in ("none", "trimmed")}
    reference = gathered(clean, [48], group_size=4)
    assert distance(result["none"], reference) > 10
    assert distance(result["trimmed"], reference) < 0.1
    assert torch.linalg.eigvalsh(result["trimmed"].pooled).min() > 0
    assert torch.equal(result["trimmed"].sample, result["none"].sample)  # only pooling knows groups


@pytest.mark.parametrize("group_weights", ["equal", "dof"])
def test_trimming_leaves_out_the_largest_and_smallest_traces(group_weights: str) -> None:
    windows = rows(230 * 3, 3).reshape(230, 3, 3) * torch.rand(230, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = gathered(windows, [230], group_size=10, group_weights=group_weights, robust="trimmed")
    order = result.group_traces.argsort()
    out = set(torch.cat([order[:3], order[-3:]]).tolist())  # ceil(0.1 · 23)
    assert {index for index, weight in enumerate(result.group_weights.tolist()) if weight == 0} == out
    groups = windows.reshape(23, 30, 3)
    kept = [np.cov(group.numpy(), rowvar=False) for index, group in enumerate(groups) if index not in out]
    np.testing.assert_allclose(result.pooled.numpy(), np.mean(kept, axis=0), rtol=1e-9, atol=TOLERANCE)
    assert float(result.group_weights.sum()) == pytest.approx(1)


def test_three_groups_are_the_fewest_to_trim() -> None:
    assert [trimmed(groups) for groups in (3, 10, 11, 20, 21, 100)] == [1, 1, 2, 2, 3, 10]
    windows = rows(60, 3).reshape(12, 5, 3)
    result = gathered(windows, [12], group_size=4, robust="trimmed")
    assert sorted(result.group_weights.tolist()) == [0, 0, 1]
    with pytest.raises(ConfigError, match=r"12 windows in groups of 6 make 2\. Lower the group size"):
        gathered(windows, [12], group_size=6, robust="trimmed")


def test_downweighting_withstands_an_outlier_token() -> None:
    clean = rows(2400, 4, mean=1.0).reshape(48, 50, 4)
    spoilt = clean.clone()
    spoilt[::5, 3] *= 1000
    result = {rule: gathered(spoilt, [48], group_size=12, robust=rule) for rule in ("none", "downweighted")}
    reference = gathered(clean, [48], group_size=12)
    assert distance(result["none"], reference) > 100
    assert distance(result["downweighted"], reference) < 0.2
    assert torch.linalg.vector_norm(result["downweighted"].mean - reference.mean) < 0.2
    assert result["downweighted"].count == 2400


def test_weighted_moments_are_those_of_numpy() -> None:
    windows = rows(60, 3).reshape(4, 15, 3)
    windows[:, 2] *= 40
    result = gathered(windows, [1, 3], group_size=4, robust="downweighted")
    norms = windows.norm(dim=-1)
    weights = (3 * norms.median(1, keepdim=True).values / norms).square().clamp(max=1).flatten()
    assert (weights < 1).sum() == 4
    flat = windows.reshape(-1, 3)
    mean = (weights[:, None] * flat).sum(0) / weights.sum()
    torch.testing.assert_close(result.mean, mean, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(result.absolute_mean, (weights[:, None] * flat.abs()).sum(0) / weights.sum(), rtol=TOLERANCE, atol=0)
    expected = np.cov(flat.numpy(), rowvar=False, aweights=weights.numpy(), ddof=0) * 60 / 59
    np.testing.assert_allclose(result.sample.numpy(), expected, rtol=1e-9)
    second = torch.einsum("t,ti,tj->ij", weights / weights.sum(), flat, flat)
    torch.testing.assert_close(result.second_moment, second, rtol=1e-9, atol=0)


def test_without_outliers_nothing_is_weighed_down() -> None:
    windows = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    plain, weighed = (gathered(windows, [6], group_size=3, robust=rule) for rule in ("none", "downweighted"))
    torch.testing.assert_close(weighed.pooled, plain.pooled, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_window_of_zeros_is_no_outlier() -> None:
    windows = torch.zeros(2, 5, 3)
    windows[0, 0] = 1.0
    result = gathered(windows, [2], group_size=2, robust="downweighted")
    assert float(result.mean[0]) == pytest.approx(0.1)


# output gradients


def test_gradient_moments_are_uncentred_means() -> None:
    data, norms = rows(3000, 6), torch.rand(3000, dtype=torch.float64)
    accumulator = GradientAccumulator("layer", 6)
    for part, norm in zip(data.split(1700), norms.split(1700), strict=True):
        accumulator.update(part, norm)
    result = accumulator.finish()
    torch.testing.assert_close(result.gradient, data.T @ data / 3000, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(result.fisher_rows, (data.square() * norms[:, None]).mean(0), rtol=TOLERANCE, atol=0)
    assert (result.count, result.width) == (3000, 6)


def test_a_bad_gradient_names_the_layer() -> None:
    accumulator = GradientAccumulator("layer", 2)
    with pytest.raises(NumericalError, match="layer: no gradient reached its output"):
        accumulator.finish()
    with pytest.raises(NumericalError, match="layer: the gradient of its output holds NaN or Inf"):
        accumulator.update(torch.tensor([[1.0, torch.nan]]), torch.ones(1))


def test_a_constant_input_has_no_variance_and_no_nan() -> None:
    result = gathered(torch.full((4, 5, 3), 2.0), [4], group_size=2)
    assert not result.pooled.any()
    assert result.pooled_to_sample == 0
    assert math.isfinite(float(result.group_traces.sum()))


@pytest.mark.parametrize("robust", ["none", "downweighted"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_names_the_layer(bad: float, robust: str) -> None:
    windows = rows(20, 3).reshape(4, 5, 3)
    windows[2, 1, 0] = bad
    with pytest.raises(NumericalError, match="layer: its input holds NaN or Inf"):
        gathered(windows, [4], group_size=2, robust=robust)


def test_squares_that_overflow_name_the_layer() -> None:
    windows = torch.ones(4, 5, 3)
    windows[2, 1, 0] = 1e30
    with pytest.raises(NumericalError, match="layer: its input holds NaN or Inf, or its squares do"):
        gathered(windows, [4], group_size=2)


def test_one_token_is_not_enough() -> None:
    with pytest.raises(NumericalError, match="1 tokens reached it"):
        gathered(torch.ones(1, 1, 3), [1], group_size=2)

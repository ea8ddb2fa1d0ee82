import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.errors import NumericalError
from lowrank_core.moments import InputStatistics, MomentAccumulator, PooledAccumulator

TOLERANCE = 1e-10  # float64, a few thousand additions


def rows(count: int, width: int, seed: int = 0, *, mean: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + mean


def gathered(windows: torch.Tensor, chunks: list[int], *, group_size: int, group_weights: str = "equal") -> InputStatistics:
    accumulator = PooledAccumulator("layer", windows.shape[-1], group_size=group_size, group_weights=group_weights)
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
    found = gathered(windows, [2, 4], group_size=6)
    assert torch.equal(found.pooled, found.sample)
    assert found.pooled_to_sample == 0


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [3, 3, 4], [7, 3]])
def test_pooling_averages_the_covariances_of_the_groups(chunks: list[int]) -> None:
    windows = rows(50, 4).reshape(10, 5, 4)
    found = gathered(windows, chunks, group_size=4)
    groups = [windows[:4], windows[4:8], windows[8:]]
    covariances = [np.cov(group.reshape(-1, 4).numpy(), rowvar=False) for group in groups]
    weights = np.array([1.0, 1.0, 0.5])  # the remainder is half a group
    np.testing.assert_allclose(found.pooled.numpy(), np.average(covariances, axis=0, weights=weights), rtol=1e-9)
    np.testing.assert_allclose(found.group_weights.numpy(), weights / weights.sum())
    np.testing.assert_allclose(found.group_traces.numpy(), [np.trace(c) for c in covariances], rtol=1e-9)
    assert found.group_counts.tolist() == [20, 20, 10]


def test_degrees_of_freedom_weigh_groups_by_their_rows() -> None:
    windows = rows(50, 4).reshape(10, 5, 4)
    found = gathered(windows, [10], group_size=4, group_weights="dof")
    groups = [windows[:4], windows[4:8], windows[8:]]
    within = sum(np.cov(g.reshape(-1, 4).numpy(), rowvar=False) * (g.shape[0] * 5 - 1) for g in groups)
    np.testing.assert_allclose(found.pooled.numpy(), within / (50 - 3), rtol=1e-9)


def test_pooling_leaves_out_what_differs_between_groups() -> None:
    windows = rows(80, 3).reshape(8, 10, 3)
    windows[4:] += 100.0
    found = gathered(windows, [8], group_size=4)
    assert float(found.sample.trace()) > 50 * float(found.pooled.trace())
    assert found.pooled_to_sample > 0.9


def test_the_second_moment_is_uncentred() -> None:
    windows = rows(30, 4).reshape(6, 5, 4)
    found = gathered(windows, [6], group_size=2)
    flat = windows.reshape(-1, 4)
    torch.testing.assert_close(found.second_moment, flat.T @ flat / len(flat), rtol=1e-10, atol=1e-10)


def test_sums_of_float32_rows_do_not_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(200_000, 2, generator=generator) + 1000
    accumulator = MomentAccumulator(2)
    for part in data.split(1000):
        accumulator.update(part)
    expected = np.cov(data.double().numpy(), rowvar=False)
    np.testing.assert_allclose(accumulator.covariance.numpy(), expected, rtol=1e-9)


def test_a_constant_input_has_no_variance_and_no_nan() -> None:
    found = gathered(torch.full((4, 5, 3), 2.0), [4], group_size=2)
    assert not found.pooled.any()
    assert found.pooled_to_sample == 0
    assert math.isfinite(float(found.group_traces.sum()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_names_the_layer(bad: float) -> None:
    windows = rows(20, 3).reshape(4, 5, 3)
    windows[2, 1, 0] = bad
    with pytest.raises(NumericalError, match="layer: its input holds NaN or Inf"):
        gathered(windows, [4], group_size=2)


def test_one_token_is_not_enough() -> None:
    with pytest.raises(NumericalError, match="1 tokens reached it"):
        gathered(torch.ones(1, 1, 3), [1], group_size=2)

"""Intervals: that they hold the truth as often as they say, and that pairing and runs of windows matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lowrank_core.evaluation.intervals import Sample, sample_of
from lowrank_core.text import WindowSet

EXPERIMENTS, WINDOWS = 200, 100


def _difference(pair: np.ndarray) -> np.ndarray:
    return np.exp(pair[..., 0]) - np.exp(pair[..., 1])


def _coverage(truth: float, experiment: Callable[[np.random.Generator], tuple[float, float]], experiments: int = EXPERIMENTS) -> float:
    intervals = [experiment(np.random.default_rng(seed)) for seed in range(experiments)]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def _pair(generator: np.random.Generator) -> tuple[Sample, Sample]:
    """Windows as hard as they are for both models, and 0.1 nats that one loses."""
    dense = generator.normal(3.0, 0.5, size=WINDOWS)
    return Sample(dense + generator.normal(0.1, 0.05, size=WINDOWS)), Sample(dense)


def test_paired_intervals_cover_the_difference_of_perplexities() -> None:
    def experiment(generator: np.random.Generator) -> tuple[float, float]:
        ours, theirs = _pair(generator)
        return ours.alongside(theirs).interval(_difference)

    assert 0.90 <= _coverage(math.exp(3.1) - math.exp(3.0), experiment) <= 0.99


def test_pairing_makes_intervals_narrow() -> None:
    """Text that is hard is hard for both: unpaired, the difference would drown in it."""
    ours, theirs = _pair(np.random.default_rng(0))
    low, high = ours.alongside(theirs).interval(_difference)
    shuffled = Sample(np.random.default_rng(1).permutation(theirs.means))
    apart = ours.alongside(shuffled).interval(_difference)
    assert high - low < (apart[1] - apart[0]) / 4
    assert low > 0 > apart[0]


def test_intervals_of_perplexity_cover() -> None:
    def experiment(generator: np.random.Generator) -> tuple[float, float]:
        return Sample(generator.gamma(9.0, 1 / 3, size=WINDOWS)).interval(np.exp)

    assert 0.90 <= _coverage(math.exp(3.0), experiment) <= 0.99


def test_intervals_cover_where_windows_score_unlike_counts() -> None:
    """Long windows are harder here: the mean over tokens is Σ c m / Σ c, (10 · 2 + 50 · 3) / 60 on average, not 2.5."""

    def experiment(generator: np.random.Generator) -> tuple[float, float]:
        counts = generator.choice([10, 50], size=WINDOWS)
        return Sample(np.where(counts == 50, 3.0, 2.0) + generator.normal(0, 0.4, size=WINDOWS), counts).interval()

    assert 0.90 <= _coverage(170 / 60, experiment) <= 0.99


def test_equal_counts_change_nothing() -> None:
    means = np.random.default_rng(0).normal(size=30)
    plain, counted = Sample(means), Sample(means, np.full(30, 7))
    assert counted.mean == pytest.approx(plain.mean)
    assert counted.stderr == pytest.approx(plain.stderr)
    assert counted.interval(np.exp) == pytest.approx(plain.interval(np.exp))


def test_one_window_has_no_error() -> None:
    assert Sample(np.array([1.0])).stderr is None
    assert Sample(np.array([1.0]), np.array([4])).stderr is None


def _strided(losses: np.ndarray, context: int, stride: int) -> tuple[torch.Tensor, WindowSet]:
    """Return the windows of a stream of losses, its first token aside: (windows, context - 1)."""
    starts = range(0, len(losses) - (context - 1) + 1, stride)
    column = torch.tensor(np.stack([losses[start : start + context - 1] for start in starts]))
    scored = (torch.arange(context - 1) >= context - 1 - stride).repeat(len(column), 1)
    scored[0] = True
    ids = torch.zeros(len(column), context, dtype=torch.int64)
    return column, WindowSet("stream", "test", ids, bos=False, available_tokens=len(losses) + 1, stride=stride, scored=scored)


def _stream(generator: np.random.Generator, tokens: int) -> np.ndarray:
    """Losses of mean 0 that go on for some ten tokens, as a hard passage does."""
    noise, level, result = generator.normal(size=tokens), 0.0, np.empty(tokens)
    for index in range(tokens):
        level = 0.9 * level + noise[index]
        result[index] = level
    return result


def test_intervals_of_a_stride_cover_and_single_windows_would_not() -> None:
    context, stride = 65, 8

    def experiment(generator: np.random.Generator) -> tuple[float, float]:
        column, windows = _strided(_stream(generator, 64 * 60), context, stride)
        return sample_of(column, windows).interval()

    def naive(generator: np.random.Generator) -> tuple[float, float]:
        column, windows = _strided(_stream(generator, 64 * 60), context, stride)
        assert windows.scored is not None
        return Sample(column[:, -stride:].mean(1).numpy()).interval()

    assert 0.90 <= _coverage(0.0, experiment, 150) <= 0.99
    assert _coverage(0.0, naive, 150) < 0.80


def test_the_mean_of_a_stride_counts_every_token_once() -> None:
    losses = np.random.default_rng(0).normal(size=15 + 5 * 9)
    column, windows = _strided(losses, 16, 5)
    sample = sample_of(column, windows)
    assert sample.counts is not None
    assert sample.counts.tolist() == [15 + 2 * 5, 15, 15, 5]  # runs of three windows of five tokens: about a context each
    assert sample.mean == pytest.approx(losses.mean())

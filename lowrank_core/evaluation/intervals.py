"""Means and bootstrap intervals over windows of text. Tokens of one window depend on each other: windows are what is drawn again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lowrank_core.studies.bootstrap import bootstrap_interval
from lowrank_core.text.windows import WindowSet

__all__ = ["Sample", "bootstrap_interval", "sample_of"]


@dataclass(frozen=True)
class Sample:
    """Means of what is drawn again: windows, or runs of overlapping windows.

    Attributes:
        means: (n,) or (n, k), a column for each of k metrics.
        counts: (n,) tokens behind each mean; None where all have as many.
    """

    means: np.ndarray
    counts: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Mean over tokens, of a single figure."""
        return float(self.means.mean() if self.counts is None else np.average(self.means, weights=self.counts))

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean: with counts c of sum C, its square is n / (n - 1) · Σ c² (m - mean)² / C²; None for one window."""
        n = len(self.means)
        if n < 2:
            return None
        if self.counts is None:
            return float(self.means.std(ddof=1) / math.sqrt(n))
        parts = self.counts * (self.means - self.mean) / self.counts.sum()
        return float(math.sqrt(n / (n - 1) * (parts**2).sum()))

    def alongside(self, other: Sample) -> Sample:
        """Return both metrics of the same windows, (n, 2): resampled together, their difference is paired."""
        return Sample(np.stack([self.means, other.means], axis=-1), self.counts)

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray] = lambda mean: mean) -> tuple[float, float] | None:
        """Return the 95 % bootstrap interval of ``statistic`` of the mean; None where there is none."""
        return bootstrap_interval(statistic, self.means, self.counts)


def sample_of(column: Tensor, windows: WindowSet) -> Sample:
    """Return the means of a figure (windows, T - 1) over the scored positions.

    Overlapping windows of a small stride score few tokens each, next to those of the window before. So consecutive windows are taken
    together that score about a context of tokens: an interval is then comparable with that of windows that do not overlap.
    """
    if windows.scored is None:
        return Sample(column.mean(1).numpy())
    scored = windows.scored.numpy()
    run = math.ceil((windows.context - 1) / (windows.stride or windows.context))
    starts = np.arange(0, len(scored), run)
    counts = np.add.reduceat(scored.sum(1), starts)
    sums = np.add.reduceat(np.where(scored, column.numpy(), 0.0).sum(1), starts)
    return Sample(sums / counts, counts)

"""Streaming first and second moments in float64, plain and pooled over groups.

Notation::

    x        an input row (n,)
    N, μ, M  count, mean and scatter M = Σ (x - μ)(x - μ)ᵀ of the rows so far
    C        covariance M / (N - 1)
    PCM      pooled covariance Σ_g w_g C_g / Σ_g w_g over groups of windows    (Bolaco, arXiv 2405.10616, Eq. 4)
    SCM      the covariance of all rows together

Merging is the pairwise update of Chan, Golub & LeVeque (1983): exact for any chunking, and stable when means are large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError

__all__ = ["InputStatistics", "MomentAccumulator", "PooledAccumulator"]


class MomentAccumulator:
    """Count, mean and scatter of rows that come in chunks."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows (N, n) of any float dtype."""
        chunk = rows.to(torch.float64)
        added = chunk.shape[0]
        if added == 0:
            return
        chunk_mean = chunk.mean(0)
        centred = chunk - chunk_mean
        self.scatter.addmm_(centred.T, centred)
        self._merge_means(added, chunk_mean)

    def merge(self, other: MomentAccumulator) -> None:
        """Add everything that ``other`` has seen."""
        if other.count == 0:
            return
        self.scatter.add_(other.scatter)
        self._merge_means(other.count, other.mean)

    def _merge_means(self, added: int, mean: Tensor) -> None:
        total = self.count + added
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """C (n, n), normalised by N - 1 as ``numpy.cov``; zeros for a single row."""
        return self.scatter / max(1, self.count - 1)


@dataclass(frozen=True)
class InputStatistics:
    """What calibration learned of one input, shared by all layers that read it.

    Attributes:
        count: rows (tokens) seen.
        mean: μ (n,), float64.
        pooled: pooled covariance, PCM (n, n), float64, each group's normalised by its N - 1.
        sample: covariance of all rows, SCM (n, n), float64, normalised by N - 1.
        group_counts: rows in each group (groups,).
        group_weights: weight of each group in the pooled covariance (groups,), summing to 1.
        group_traces: trace of each group's covariance (groups,).
        group_mean_shifts: ‖μ_g - μ‖² of each group (groups,).
    """

    count: int
    mean: Tensor
    pooled: Tensor
    sample: Tensor
    group_counts: Tensor
    group_weights: Tensor
    group_traces: Tensor
    group_mean_shifts: Tensor

    @property
    def width(self) -> int:
        return self.mean.shape[0]

    @property
    def second_moment(self) -> Tensor:
        """S = E[x xᵀ] (n, n), uncentred, normalised by N."""
        return self.sample * ((self.count - 1) / self.count) + torch.outer(self.mean, self.mean)

    @property
    def pooled_to_sample(self) -> float:
        """‖PCM - SCM‖_F / ‖SCM‖_F: how much pooling changed; 0 for a constant input."""
        norm = float(torch.linalg.matrix_norm(self.sample))
        return float(torch.linalg.matrix_norm(self.pooled - self.sample)) / norm if norm > 0 else 0.0


class PooledAccumulator:
    """Moments over groups of ``group_size`` consecutive windows; a remainder forms its own group."""

    def __init__(self, name: str, width: int, *, group_size: int, group_weights: str, device: torch.device | str = "cpu") -> None:
        self._name, self._width, self._device = name, width, device
        self._group_size, self._rule = group_size, group_weights
        self._total = MomentAccumulator(width, device)
        self._group = MomentAccumulator(width, device)
        self._windows_in_group = 0
        self._pooled = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._means: list[Tensor] = []
        self._counts: list[int] = []
        self._weights: list[float] = []
        self._traces: list[float] = []

    def update(self, windows: Tensor) -> None:
        """Add windows (B, T, n), in order; a batch may straddle groups.

        Raises:
            NumericalError: the input holds NaN or Inf; names the layer.
        """
        while len(windows):
            room = self._group_size - self._windows_in_group
            part, windows = windows[:room], windows[room:]
            self._group.update(part.reshape(-1, self._width))
            self._windows_in_group += len(part)
            if not torch.isfinite(self._group.mean).all():
                raise NumericalError(
                    f"{self._name}: its input holds NaN or Inf. Run the model in float32 or bfloat16, or check its weights."
                )
            if self._windows_in_group == self._group_size:
                self._close_group()

    def _close_group(self) -> None:
        group = self._group
        covariance = group.covariance
        share = self._windows_in_group / self._group_size  # below 1 only for a remainder
        weight = share if self._rule == "equal" else float(group.count - 1)
        self._pooled.add_(covariance, alpha=weight)
        self._weights.append(weight)
        self._counts.append(group.count)
        self._traces.append(float(covariance.trace()))
        self._means.append(group.mean)
        self._total.merge(group)
        self._group = MomentAccumulator(self._width, self._device)
        self._windows_in_group = 0

    def finish(self) -> InputStatistics:
        """Return the statistics on the CPU.

        Raises:
            NumericalError: no rows were seen.
        """
        if self._windows_in_group:
            self._close_group()
        total = self._total
        if total.count < 2 or sum(self._weights) == 0:
            raise NumericalError(
                f"{self._name}: {total.count} tokens reached it; a covariance needs at least 2 in a group. Calibrate on more text."
            )
        weights = torch.tensor(self._weights, dtype=torch.float64)
        shifts = (torch.stack(self._means) - total.mean).square().sum(1)
        one_group = len(weights) == 1
        pooled = total.covariance if one_group else self._pooled / weights.sum()
        return InputStatistics(
            count=total.count,
            mean=total.mean.cpu(),
            pooled=pooled.cpu(),
            sample=total.covariance.cpu(),
            group_counts=torch.tensor(self._counts, dtype=torch.float64),
            group_weights=weights / weights.sum(),
            group_traces=torch.tensor(self._traces, dtype=torch.float64),
            group_mean_shifts=shifts.cpu(),
        )

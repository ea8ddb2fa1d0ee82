"""Covariances pooled over groups of windows: plainly as in the paper, or robustly.

Notation (that of ``moments``)::

    PCM      pooled covariance Σ_g p_g C_g / Σ_g p_g over groups of windows    (Bolaco, arXiv 2405.10616, Eq. 4)
    p_g      1 (a remainder: its share of a full group), or the degrees of freedom N_g - 1; 0 for a group that is trimmed
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.statistics.moments import InputStatistics, MomentAccumulator

__all__ = ["PooledAccumulator", "check_groups", "token_weights", "trimmed"]

_TRIM = 0.1
"""Fraction of the groups that a trimmed pooling leaves out at each end."""

_OUTLIER = 3.0
"""Norms beyond this many medians of their window are down-weighted."""


def trimmed(groups: int) -> int:
    """Return how many groups with the largest trace, and as many with the smallest, a trimmed pooling leaves out: ceil(0.1·groups)."""
    return -int(-_TRIM * groups // 1)


def check_groups(robust: str, windows: int, group_size: int) -> None:
    """Raise unless ``windows`` make enough groups for the pooling rule ``robust``.

    Raises:
        ConfigError: trimmed pooling of fewer than 3 groups.
    """
    groups = -(-windows // group_size)
    if robust == "trimmed" and groups < 3:
        raise ConfigError(
            f"trimmed pooling leaves out the groups with the largest and the smallest trace, so it needs at least 3; "
            f"{windows} windows in groups of {group_size} make {groups}. Lower the group size, or use more calibration windows."
        )


@dataclass(frozen=True)
class _Group:
    index: int
    trace: float
    weight: float
    covariance: Tensor

    @property
    def order(self) -> tuple[float, int]:
        return self.trace, self.index


class _Pool:
    """Weighted sum of covariances; the ``kept_out`` largest and smallest by trace wait outside, and never enter."""

    def __init__(self, width: int, kept_out: int, device: torch.device | str) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.weights: list[float] = []
        self._kept_out = kept_out
        self._least: list[_Group] = []
        self._most: list[_Group] = []

    def add(self, covariance: Tensor, trace: float, weight: float) -> None:
        self._least.append(_Group(len(self.weights), trace, weight, covariance))
        self.weights.append(0.0)
        self._least.sort(key=lambda group: group.order)
        self._most += self._least[self._kept_out :]
        del self._least[self._kept_out :]
        self._most.sort(key=lambda group: group.order)
        while len(self._most) > self._kept_out:
            group = self._most.pop(0)
            self.total.add_(group.covariance, alpha=group.weight)
            self.weights[group.index] = group.weight

    def merge(self, other: _Pool) -> None:
        """Add another pool; what either keeps out could not be compared, so neither may keep out anything."""
        assert self._kept_out == other._kept_out == 0
        self.total.add_(other.total)
        self.weights += other.weights


class PooledAccumulator:
    """Moments over groups of ``group_size`` consecutive windows; a remainder forms its own group."""

    def __init__(
        self,
        name: str,
        width: int,
        *,
        group_size: int,
        group_weights: str,
        robust: str = "none",
        windows: int | None = None,
        device: torch.device | str = "cpu",
        routed: bool = False,
    ) -> None:
        """``robust`` is none, trimmed (which must be reported how many ``windows`` will come) or downweighted.

        Of an expert (``routed``) groups have as many rows as were routed to it, none included: each counts by its degrees of freedom.

        Raises:
            ConfigError: too few windows to trim.
        """
        assert windows is not None or robust != "trimmed"
        check_groups(robust, windows or 0, group_size)
        self._name, self._width, self._device, self._routed = name, width, device, routed
        self._group_size, self._rule, self._robust = group_size, group_weights, robust
        self._total = MomentAccumulator(width, device)
        self._group = MomentAccumulator(width, device)
        self._windows_in_group = 0
        self._pool = _Pool(width, trimmed(-(-(windows or 0) // group_size)) if robust == "trimmed" else 0, device)
        self._means: list[Tensor] = []
        self._counts: list[int] = []
        self._traces: list[float] = []

    def update(self, windows: Tensor) -> None:
        """Add windows (B, T, n), in order; a batch may straddle groups.

        Raises:
            NumericalError: the input holds NaN or Inf; names the layer.
        """
        while len(windows):
            part, windows = windows[: self._room], windows[self._room :]
            weights = token_weights(part).flatten() if self._robust == "downweighted" else None
            self._add(part.reshape(-1, self._width), weights, len(part))

    def update_routed(self, rows: Tensor, weights: Tensor, owners: Tensor, windows: int) -> None:
        """Add rows (n, d) of an expert, weighed by the squares of their routing weights (n,).

        Args:
            owners: window of each row (n,), from 0.
            windows: in the batch, those that no row came from included.

        Raises:
            NumericalError: as ``update``.
        """
        weights = weights.to(torch.float32).square()
        if self._robust == "downweighted" and len(rows):
            weights = weights * token_weights(rows[None])[0]
        done = 0
        while done < windows:
            stop = min(done + self._room, windows)
            inside = (owners >= done) & (owners < stop)
            self._add(rows[inside], weights[inside], stop - done)
            done = stop

    @property
    def _room(self) -> int:
        """Windows that the group under way still takes."""
        return self._group_size - self._windows_in_group

    def _add(self, rows: Tensor, weights: Tensor | None, windows: int) -> None:
        self._group.update(rows, weights)
        self._windows_in_group += windows
        self._check_finite(self._group.mean)
        if self._windows_in_group == self._group_size:
            self._close_group()

    def _check_finite(self, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise NumericalError(
                f"{self._name}: its input holds NaN or Inf, or its squares do. Run the model in float32 or bfloat16, or check its weights."
            )

    def _close_group(self) -> None:
        group = self._group
        covariance = group.covariance
        share = self._windows_in_group / self._group_size  # below 1 only for a remainder
        weight = share if self._rule == "equal" and not self._routed else max(0.0, float(group.count - 1))
        self._check_finite(covariance.diagonal())
        self._counts.append(group.count)
        self._traces.append(float(covariance.trace()))
        self._means.append(group.mean)
        self._pool.add(covariance, self._traces[-1], weight)
        self._total.merge(group)
        self._group = MomentAccumulator(self._width, self._device)
        self._windows_in_group = 0

    def merge(self, other: PooledAccumulator) -> None:
        """Add everything that ``other`` has seen of the windows after these; no group has windows of both."""
        assert not self._windows_in_group
        other._close()
        self._total.merge(other._total)
        self._pool.merge(other._pool)
        self._means += other._means
        self._counts += other._counts
        self._traces += other._traces

    def _close(self) -> None:
        if self._windows_in_group:
            self._close_group()

    def finish(self) -> InputStatistics:
        """Return the statistics on the CPU; those of an expert that no token reached are zero.

        Raises:
            NumericalError: no rows were seen, outside a mixture.
        """
        self._close()
        total = self._total
        weights = torch.tensor(self._pool.weights, dtype=torch.float64)
        if self._routed and weights.sum() == 0:
            weights = torch.ones_like(weights)
        if not self._routed and (total.count < 2 or weights.sum() == 0):
            raise NumericalError(
                f"{self._name}: {total.count} tokens reached it; a covariance needs at least 2 in a group. Calibrate on more text."
            )
        sample = total.covariance.cpu()
        return InputStatistics(
            count=total.count,
            mean=total.mean.cpu(),
            absolute_mean=total.absolute_mean.cpu(),
            pooled=sample if len(weights) == 1 else (self._pool.total / weights.sum().item()).cpu(),
            sample=sample,
            group_counts=torch.tensor(self._counts, dtype=torch.float64),
            group_weights=weights / weights.sum(),
            group_traces=torch.tensor(self._traces, dtype=torch.float64),
            group_mean_shifts=(torch.stack(self._means) - total.mean).square().sum(1).cpu(),
        )


def token_weights(windows: Tensor) -> Tensor:
    """Return w = min(1, (3 ν / ‖x‖)²) (B, T) of windows (B, T, n), ν the median norm of each window; 1 where ν is 0."""
    norms = torch.linalg.vector_norm(windows, dim=-1, dtype=torch.promote_types(windows.dtype, torch.float32))
    medians = norms.median(1, keepdim=True).values
    weights = (_OUTLIER * medians / norms).square().clamp(max=1)
    return torch.where((norms <= _OUTLIER * medians) | (medians == 0), torch.ones_like(norms), weights)

"""Streaming moments of inputs and of output gradients, summed in float64; covariances plain, pooled over groups, or robust.

Notation::

    x        an input row (n,);  w its weight, 1 unless tokens are down-weighted
    N, W     rows so far, and the sum of their weights
    μ, M     weighted mean Σ w x / W, and scatter Σ w (x - μ)(x - μ)ᵀ
    C        covariance (N / W) M / (N - 1): weights count relative to their mean, and with w = 1 it is M / (N - 1)
    PCM      pooled covariance Σ_g p_g C_g / Σ_g p_g over groups of windows    (Bolaco, arXiv 2405.10616, Eq. 4)
    SCM      the covariance of all rows together
    g        gradient (m,) of the loss, summed over tokens, with respect to a layer's output at one token

Merging is the pairwise update of Chan, Golub & LeVeque (1983): exact for any chunking, and stable when means are large. Products of rows
in float32 or less are taken in float32 within blocks of ``BLOCK_ROWS`` rows, after centring on the block's mean; float64 rows stay in
float64. Sums across blocks are in float64: float32 sums would drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.errors import ConfigError, NumericalError

__all__ = [
    "GradientAccumulator",
    "InputStatistics",
    "MomentAccumulator",
    "OutputStatistics",
    "PooledAccumulator",
    "check_groups",
    "trimmed",
]

BLOCK_ROWS = 1024
"""Rows in a product of one precision: its rounding error, about 1e-6 relative, is far below that of sampling."""

_PANELS, _PANEL_WIDTH = 4, 64
"""A Gram matrix is symmetric: by panels of columns, only 5/8 of it is computed."""

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


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows in the dtype that they are multiplied in."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    for block in torch.split(rows, BLOCK_ROWS):
        yield block.to(dtype)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the upper triangle of rowsᵀ rows (n, n) to ``total``; below its diagonal anything may be left."""
    width = rows.shape[1]
    panel = max(_PANEL_WIDTH, -(-width // _PANELS))
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        total[start:stop, start:].add_(rows[:, start:stop].T @ rows[:, start:])


def _mirrored(upper: Tensor) -> Tensor:
    """Return the symmetric matrix (n, n) that has this upper triangle."""
    return torch.triu(upper).add_(torch.triu(upper, 1).T)


class MomentAccumulator:
    """Count, weight, mean, mean magnitude and scatter of rows that come in chunks."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.weight = 0.0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._upper = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._magnitudes = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add rows (N, n) of any float dtype, with ``weights`` (N,) in [0, 1]."""
        parts = [None] * -(-len(rows) // BLOCK_ROWS) if weights is None else torch.split(weights, BLOCK_ROWS)
        for block, part in zip(_blocks(rows), parts, strict=True):
            self.count += len(block)
            if part is None:
                self._add(block, float(len(block)))
            elif (weight := float(part.sum(dtype=torch.float64))) != 0:  # NaN goes in, to be noticed
                self._add(block, weight, part.to(block.dtype)[:, None])

    def _add(self, block: Tensor, weight: float, weights: Tensor | None = None) -> None:
        def total(values: Tensor) -> Tensor:
            return (values if weights is None else values * weights).sum(0)

        shift = total(block) / weight
        centred = block - shift
        rounding = total(centred).to(torch.float64) / weight  # of the float32 mean: a correction, not a formality, for large means
        _add_gram(self._upper, centred if weights is None else centred * weights.sqrt())
        self._upper.addr_(rounding, rounding, alpha=-weight)
        self._magnitudes += total(block.abs())
        self._merge_means(weight, shift.to(torch.float64) + rounding)

    def merge(self, other: MomentAccumulator) -> None:
        """Add everything that ``other`` has seen."""
        self.count += other.count
        if other.weight > 0:
            self._upper.add_(other._upper)
            self._magnitudes.add_(other._magnitudes)
            self._merge_means(other.weight, other.mean)

    def _merge_means(self, added: float, mean: Tensor) -> None:
        total = self.weight + added
        shift = mean - self.mean
        self._upper.addr_(shift, shift, alpha=self.weight * added / total)
        self.mean += shift * (added / total)
        self.weight = total

    @property
    def scatter(self) -> Tensor:
        """M (n, n), exactly symmetric."""
        return _mirrored(self._upper)

    @property
    def covariance(self) -> Tensor:
        """C (n, n), normalised by N - 1 as ``numpy.cov``; zeros for a single row."""
        return self.scatter.mul_(self.count / (self.weight * max(1, self.count - 1)) if self.weight else 0.0)

    @property
    def absolute_mean(self) -> Tensor:
        """Weighted mean of \\|x_j\\| (n,)."""
        return self._magnitudes / max(self.weight, torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class InputStatistics:
    """What calibration learned of one input, shared by all layers that read it.

    With ``downweighted`` calibration the mean, magnitudes and covariances are those of the weighted tokens, w_t = min(1, (3 ν / ‖x_t‖)²)
    with ν the median of ‖x_t‖ over the token's window (all 1 where ν is 0), and covariances are normalised as weights relative to
    their mean: Σ w (x - μ)(x - μ)ᵀ · N / (W (N - 1)).

    Attributes:
        count: rows (tokens) seen, whatever their weights.
        mean: μ (n,), float64.
        absolute_mean: E|x_j| (n,), float64.
        pooled: pooled covariance, PCM (n, n), float64, each group's normalised by its N - 1.
        sample: covariance of all rows, SCM (n, n), float64, normalised by N - 1.
        group_counts: rows in each group (groups,).
        group_weights: weight of each group in the pooled covariance (groups,), summing to 1; 0 for those that trimming left out.
        group_traces: trace of each group's covariance (groups,).
        group_mean_shifts: ‖μ_g - μ‖² of each group (groups,).
    """

    count: int
    mean: Tensor
    absolute_mean: Tensor
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
    ) -> None:
        """``robust`` is none, trimmed (which must be told how many ``windows`` will come) or downweighted.

        Raises:
            ConfigError: too few windows to trim.
        """
        assert windows is not None or robust != "trimmed"
        check_groups(robust, windows or 0, group_size)
        self._name, self._width, self._device = name, width, device
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
            room = self._group_size - self._windows_in_group
            part, windows = windows[:room], windows[room:]
            weights = _token_weights(part).flatten() if self._robust == "downweighted" else None
            self._group.update(part.reshape(-1, self._width), weights)
            self._windows_in_group += len(part)
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
        weight = share if self._rule == "equal" else float(group.count - 1)
        self._check_finite(covariance.diagonal())
        self._counts.append(group.count)
        self._traces.append(float(covariance.trace()))
        self._means.append(group.mean)
        self._pool.add(covariance, self._traces[-1], weight)
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
        weights = torch.tensor(self._pool.weights, dtype=torch.float64)
        if total.count < 2 or weights.sum() == 0:
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


def _token_weights(windows: Tensor) -> Tensor:
    """Return w = min(1, (3 ν / ‖x‖)²) (B, T) of windows (B, T, n), ν the median norm of each window; 1 where ν is 0."""
    norms = torch.linalg.vector_norm(windows, dim=-1, dtype=torch.promote_types(windows.dtype, torch.float32))
    medians = norms.median(1, keepdim=True).values
    weights = (_OUTLIER * medians / norms).square().clamp(max=1)
    return torch.where((norms <= _OUTLIER * medians) | (medians == 0), torch.ones_like(norms), weights)


@dataclass(frozen=True)
class OutputStatistics:
    """What the output gradients of one layer tell: its part of the true Fisher, labels sampled from the model's own distribution.

    ½ tr(G ΔW S ΔWᵀ), S = E[x xᵀ], estimates the KL divergence in nats per token that a change ΔW of the weights causes (K-FAC,
    arXiv 1503.05671: x and g, and the tokens of a window, taken as independent; where attention sums a shift that all tokens share,
    the divergence is several times more).

    Attributes:
        count: tokens seen.
        gradient: G = E[g gᵀ] (m, m), float64, uncentred.
        fisher_rows: E[g_i² ‖x‖²] (m,), float64: row sums of the diagonal Fisher of W if tokens are independent (FWSVD, arXiv 2207.00112).
    """

    count: int
    gradient: Tensor
    fisher_rows: Tensor

    @property
    def width(self) -> int:
        return self.fisher_rows.shape[0]


class GradientAccumulator:
    """Second moments of the output gradients of one layer, which come in chunks."""

    def __init__(self, name: str, width: int, device: torch.device | str = "cpu") -> None:
        self._name = name
        self._count = 0
        self._upper = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._rows = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, gradients: Tensor, input_norms: Tensor) -> None:
        """Add gradients (N, m) of tokens whose inputs have squared norms ``input_norms`` (N,).

        Raises:
            NumericalError: they hold NaN or Inf; names the layer.
        """
        for block, norms in zip(_blocks(gradients), torch.split(input_norms, BLOCK_ROWS), strict=True):
            self._count += len(block)
            _add_gram(self._upper, block)
            self._rows += norms.to(block.dtype) @ block.square()
        if not torch.isfinite(self._rows).all():
            raise NumericalError(
                f"{self._name}: the gradient of its output holds NaN or Inf. Run the model in float32 or bfloat16, or check its weights."
            )

    def finish(self) -> OutputStatistics:
        """Return the statistics on the CPU.

        Raises:
            NumericalError: no gradient was seen.
        """
        if not self._count:
            raise NumericalError(f"{self._name}: no gradient reached its output. Leave the layer out, or calibrate on more text.")
        return OutputStatistics(self._count, (_mirrored(self._upper) / self._count).cpu(), (self._rows / self._count).cpu())

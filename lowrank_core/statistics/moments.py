"""Streaming moments of inputs and of output gradients, summed in float64.

Notation::

    x        an input row (n,);  w its weight, 1 unless tokens are down-weighted
    N, W     rows so far, and the sum of their weights
    μ, M     weighted mean Σ w x / W, and scatter Σ w (x - μ)(x - μ)ᵀ
    C        covariance (N / W) M / (N - 1): weights count relative to their mean, and with w = 1 it is M / (N - 1)
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

from lowrank_core.errors import NumericalError

__all__ = ["BLOCK_ROWS", "GradientAccumulator", "InputStatistics", "MomentAccumulator", "OutputStatistics", "add_gram", "mirrored"]

BLOCK_ROWS = 2048
"""Rows in a product of one precision: its rounding error, about 1e-6 relative, is far below that of sampling."""

_PANELS, _PANEL_WIDTH = 4, 64
"""A Gram matrix is symmetric: by panels of columns, only 5/8 of it is computed."""


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows in the dtype that they are multiplied in."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    for block in torch.split(rows, BLOCK_ROWS):
        yield block.to(dtype)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the upper triangle of rowsᵀ rows (n, n) to ``total``; below its diagonal anything may be left."""
    width = rows.shape[1]
    panel = max(_PANEL_WIDTH, -(-width // _PANELS))
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        total[start:stop, start:].add_(rows[:, start:stop].T @ rows[:, start:])


def mirrored(upper: Tensor) -> Tensor:
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
        add_gram(self._upper, centred if weights is None else centred * weights.sqrt())
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
        return mirrored(self._upper)

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
    """Statistics of one input, shared by all layers that read it.

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
        return self.moment_about(torch.zeros_like(self.mean))

    def moment_about(self, point: Tensor) -> Tensor:
        """Return E[(x - c)(x - c)ᵀ] (n, n) about ``point`` c (n,), normalised by N."""
        shift = self.mean - point
        return self.sample * (max(self.count - 1, 1) / max(self.count, 1)) + torch.outer(shift, shift)

    @property
    def pooled_to_sample(self) -> float:
        """‖PCM - SCM‖_F / ‖SCM‖_F: how much pooling changed; 0 for a constant input."""
        norm = float(torch.linalg.matrix_norm(self.sample))
        return float(torch.linalg.matrix_norm(self.pooled - self.sample)) / norm if norm > 0 else 0.0


@dataclass(frozen=True)
class OutputStatistics:
    """Gradient statistics of one layer's output: its part of the true Fisher, with labels sampled from the model.

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
            add_gram(self._upper, block)
            self._rows += norms.to(block.dtype) @ block.square()
        if not torch.isfinite(self._rows).all():
            raise NumericalError(
                f"{self._name}: the gradient of its output holds NaN or Inf. Run the model in float32 or bfloat16, or check its weights."
            )

    def merge(self, other: GradientAccumulator) -> None:
        """Add everything that ``other`` has seen."""
        self._count += other._count
        self._upper.add_(other._upper)
        self._rows.add_(other._rows)

    def finish(self, tokens: int | None = None) -> OutputStatistics:
        """Return the statistics on the CPU.

        Args:
            tokens: of the text, for an expert: its gradient is zero at those that do not reach it. None where every token does.

        Raises:
            NumericalError: no gradient was seen, outside a mixture.
        """
        if tokens is not None:
            return OutputStatistics(self._count, (mirrored(self._upper) / tokens).cpu(), (self._rows / tokens).cpu())
        if not self._count:
            raise NumericalError(f"{self._name}: no gradient reached its output. Leave the layer out, or calibrate on more text.")
        return OutputStatistics(self._count, (mirrored(self._upper) / self._count).cpu(), (self._rows / self._count).cpu())

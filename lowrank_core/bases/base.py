"""The two-step contract of every basis: decompose once, then any rank is a slice.

Notation::

    W (m, n)   weight,  m = d_out, n = d_in
    B (m, k)   left factors,  A (k, n) right factors, ordered so that W_r = B[:, :r] A[:r]
    e_r        error left at rank r in the basis's own metric; e_0 is everything, e_k = 0 but for rounding
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowrank_core.accounting import MatrixShape
from lowrank_core.errors import RankError
from lowrank_core.moments import InputStatistics

__all__ = ["Basis", "FactorBasis", "Factors"]


@dataclass(frozen=True)
class Factors:
    """y = up (down x) + bias: up (m, r), down (r, n), bias (m,) or None; float64."""

    up: Tensor
    down: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class FactorBasis:
    """Nested factors of one matrix.

    Attributes:
        shape: the matrix, as the price list that holds for this basis (a centred one adds a bias).
        up: B (m, k), float64.
        down: A (k, n), float64.
        bias: b (m,) of the dense layer, or None.
        output_mean: W μ (m,) for a centred basis, else None.
        input_mean: μ (n,) for a centred basis, else None.
        errors: e_0 … e_k (k + 1,), float64, descending.
    """

    shape: MatrixShape
    up: Tensor
    down: Tensor
    bias: Tensor | None
    output_mean: Tensor | None
    input_mean: Tensor | None
    errors: Tensor

    @property
    def max_rank(self) -> int:
        return self.up.shape[1]

    def slice(self, rank: int) -> Factors:
        """Return the factors at ``rank``.

        Raises:
            RankError: rank outside [1, max_rank].
        """
        if not 1 <= rank <= self.max_rank:
            raise RankError(
                f"{self.shape.name}: rank must be in [1, {self.max_rank}], got {rank}. Lower it, or leave the layer dense (null)."
            )
        up, down = self.up[:, :rank], self.down[:rank]
        return Factors(up, down, self._bias_at(up, down))

    def _bias_at(self, up: Tensor, down: Tensor) -> Tensor | None:
        """Return b + W μ - B_r A_r μ: the mean output stays exact (METHODS §1, Centring)."""
        if self.output_mean is None or self.input_mean is None:
            return self.bias
        correction = self.output_mean - up @ (down @ self.input_mean)
        return correction if self.bias is None else self.bias + correction


class Basis(Protocol):
    """A way to order a matrix's directions."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def needs_data(self) -> bool: ...
    @property
    def adds_bias(self) -> bool:
        """Whether factors carry a bias even where the dense layer has none."""

    def factorize(self, shape: MatrixShape, weight: Tensor, bias: Tensor | None, statistics: InputStatistics) -> FactorBasis:
        """Decompose ``weight`` (m, n), given the statistics of its input; all float64.

        Raises:
            NumericalError: NaN, Inf, or no convergence; names the layer.
        """

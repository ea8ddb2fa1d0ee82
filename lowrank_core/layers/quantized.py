"""Factors in 8 bits: W_ij ~ s_i q_ij with whole numbers q from -127 to 127 and one scale s_i for each row.

The largest |W_ij| of a row is 127 s_i; s_i is rounded up to the dtype that it is stored in before q is chosen, so that a later cast
of the scales changes nothing. What is multiplied is float: x (s q)ᵀ = (x qᵀ) s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Factor", "Int8Matrix", "applied", "dense_of"]

_MAX = 127


class Int8Matrix(nn.Module):
    """Rows (..., rows, columns) of int8 ``values`` with ``scales`` (..., rows); both are stored, neither is trained."""

    values: Tensor
    scales: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(shape[:-1]))

    @classmethod
    def of(cls, matrix: Tensor, stored_dtype: torch.dtype) -> Int8Matrix:
        """Return ``matrix`` (..., rows, columns) in 8 bits, with scales that ``stored_dtype`` holds exactly."""
        result = cls(*([0] * matrix.ndim))
        exact = matrix.detach().abs().amax(-1).double() / _MAX
        scales = exact.to(stored_dtype)
        scales = torch.where(scales.double() < exact, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
        scales = torch.where(scales > 0, scales, 1.0)
        whole = (matrix.detach().double() / scales.double()[..., None]).round()
        result.values = whole.clamp(-_MAX, _MAX).to(torch.int8)
        result.scales = scales.to(matrix.dtype)
        return result

    @property
    def dense(self) -> Tensor:
        """The (..., rows, columns) matrix that this stands for; made again each time."""
        return self.values.to(self.scales.dtype) * self.scales[..., None]

    def extra_repr(self) -> str:
        return "x".join(map(str, self.values.shape))


Factor = nn.Parameter | Int8Matrix
"""A factor as it is stored."""


def dense_of(factor: Factor) -> Tensor:
    """Return the factor as a matrix of floats."""
    return factor.dense if isinstance(factor, Int8Matrix) else factor


def applied(factor: Factor, input: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``input`` (..., columns) times the transpose of a factor (rows, columns), plus the bias (rows,)."""
    if not isinstance(factor, Int8Matrix):
        return functional.linear(input, factor, bias)
    products = functional.linear(input, factor.values.to(input.dtype)) * factor.scales.to(input.dtype)
    return products if bias is None else products + bias

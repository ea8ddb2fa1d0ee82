"""Matrices in 8 and 4 bits: W_ij ~ s_ik q_ij with whole numbers q and a scale s for each group k of columns of a row.

====== ============== ====================================================== ======================================
grid   q              scale                                                  on disk
====== ============== ====================================================== ======================================
int8   -127 … 127     of a row: largest \\|W_ij\\| / 127, rounded up           a byte each, scales as other floats
int4   -8 … 7         of 64 or 128 columns: the W_ij of largest size / -8    two in a byte, scales in float16
====== ============== ====================================================== ======================================

Scales are exact in every dtype that they may be cast to (those of int4 in float16 and bfloat16 alike), so that writing and reading
change nothing. What is multiplied is float.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_core.errors import NumericalError
from lowrank_core.files.grids import Grid

__all__ = [
    *("Factor", "Int4Matrix", "Int8Matrix", "QuantizedMatrix"),
    *("applied", "dense_of", "empty_as", "matrix_of", "quantized_as", "scaled", "scales_of"),
]


class QuantizedMatrix(nn.Module):
    """Rows (..., rows, columns) of whole numbers, stored as ``values``, with ``scales``; neither is trained."""

    bits: ClassVar[int]
    grid: Grid
    columns: int
    values: Tensor
    scales: Tensor

    def __init__(self, grid: Grid, shape: tuple[int, ...]) -> None:
        """Make a matrix of ``shape`` (..., rows, columns) that is still to be loaded."""
        super().__init__()
        self.grid, self.columns = grid, shape[-1]

    @classmethod
    def of_whole(cls, whole: Tensor, scales: Tensor, grid: Grid) -> Self:
        """Return the matrix of whole numbers (..., rows, columns) and ``scales`` (..., rows, groups), which keep their dtype."""
        raise NotImplementedError

    @property
    @abstractmethod
    def whole(self) -> Tensor:
        """q (..., rows, columns)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.columns)

    @property
    def numbers(self) -> int:
        """Count of q and scales."""
        return self.values[..., 0].numel() * self.columns + self.scales.numel() if self.columns else self.scales.numel()

    def bytes(self, itemsize: int) -> int:
        """Return its bytes on disk, where other floats take ``itemsize``."""
        return self.grid.bytes(self.values.shape[:-1].numel(), self.columns, itemsize)

    def dense_in(self, dtype: torch.dtype) -> Tensor:
        """Return the (..., rows, columns) matrix that this stands for."""
        scales = self.scales.to(dtype).reshape(*self.values.shape[:-1], self.grid.scales(self.columns))
        return scaled(self.whole.to(dtype), scales, self.grid)

    @property
    def dense(self) -> Tensor:
        """The (..., rows, columns) matrix that this stands for; made again each time."""
        return self.dense_in(self.scales.dtype)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.grid.name}"


class Int8Matrix(QuantizedMatrix):
    """A byte for each number: int8 ``values`` (..., rows, columns) with ``scales`` (..., rows)."""

    bits = 8

    def __init__(self, grid: Grid, shape: tuple[int, ...]) -> None:
        super().__init__(grid, shape)
        self.register_buffer("values", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(shape[:-1]))

    @classmethod
    def of_whole(cls, whole: Tensor, scales: Tensor, grid: Grid) -> Self:
        result = cls(grid, (*[0] * (whole.ndim - 1), whole.shape[-1]))
        result.values, result.scales = whole.to(torch.int8), scales[..., 0]
        return result

    @property
    def whole(self) -> Tensor:
        return self.values


class Int4Matrix(QuantizedMatrix):
    """Two numbers in a byte: uint8 ``values`` (..., rows, ⌈columns/2⌉), even columns in the low bits, as q + 8.

    In memory ``scales`` (..., rows, groups) have the dtype of the model, in a state dict float16.
    """

    bits = 4

    def __init__(self, grid: Grid, shape: tuple[int, ...]) -> None:
        super().__init__(grid, shape)
        self.register_buffer("values", torch.zeros((*shape[:-1], grid.width(shape[-1])), dtype=torch.uint8))
        self.register_buffer("scales", torch.ones((*shape[:-1], grid.scales(shape[-1]))))

    @classmethod
    def of_whole(cls, whole: Tensor, scales: Tensor, grid: Grid) -> Self:
        result = cls(grid, (*[0] * (whole.ndim - 1), whole.shape[-1]))
        shifted = functional.pad((whole + 8).to(torch.uint8), (0, whole.shape[-1] % 2))
        result.values, result.scales = shifted[..., 0::2] | shifted[..., 1::2] << 4, scales
        return result

    @property
    def whole(self) -> Tensor:
        pairs = torch.stack([self.values & 15, self.values >> 4], dim=-1)
        return pairs.flatten(-2)[..., : self.columns].to(torch.int8) - 8

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}scales"] = destination[f"{prefix}scales"].to(torch.float16)


MATRICES: Mapping[int, type[QuantizedMatrix]] = {kind.bits: kind for kind in (Int8Matrix, Int4Matrix)}
"""Bits -> class."""

Factor = nn.Parameter | QuantizedMatrix
"""A matrix as it is stored."""


def scales_of(matrix: Tensor, grid: Grid, stored_dtype: torch.dtype) -> Tensor:
    """Return the scales (..., rows, groups) of a matrix (..., rows, columns) in float64, exact in the dtype that they are stored in.

    Args:
        stored_dtype: of the floats in the file; scales of int4 are in float16 there.

    Raises:
        NumericalError: NaN or Inf, or numbers too large for a scale in float16.
    """
    groups = _grouped(matrix.detach().double(), grid)
    if not groups.isfinite().all():
        raise NumericalError("a matrix to be quantised holds NaN or Inf. Load another checkpoint, or calibrate on more text.")
    if not groups.shape[-1]:
        return groups.new_ones(groups.shape[:-1])
    low, high = grid.range
    if low == -high:
        exact = groups.abs().amax(-1) / high
        scales = exact.to(stored_dtype)
        scales = torch.where(scales.double() < exact, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    else:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        # Eight significant bits, in the range of float16: a cast to either changes nothing.
        scales = (largest / low).to(torch.bfloat16).to(torch.float16)
    if not scales.isfinite().all():
        raise NumericalError(f"a matrix to be quantised holds numbers too large for {grid.name}. Leave what stays dense in floats.")
    return torch.where(scales != 0, scales.double(), 1.0)


def _grouped(matrix: Tensor, grid: Grid) -> Tensor:
    """Return (..., rows, groups, group): a shorter last group is filled with zeros, which no scale depends on."""
    columns = matrix.shape[-1]
    groups, size = grid.scales(columns), grid.group or columns
    return functional.pad(matrix, (0, groups * size - columns)).reshape(*matrix.shape[:-1], groups, size)


def scaled(whole: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return s q (..., rows, columns) from q, and ``scales`` (..., rows, groups) in the same dtype."""
    return whole * (scales.repeat_interleave(grid.group, -1)[..., : whole.shape[-1]] if grid.group else scales)


def quantized_as(matrix: Tensor, grid: Grid, stored_dtype: torch.dtype) -> QuantizedMatrix:
    """Return a matrix (..., rows, columns) rounded to the nearest numbers of a grid; scales have the dtype of the matrix.

    Raises:
        NumericalError: as ``scales_of``.
    """
    scales = scales_of(matrix, grid, stored_dtype)
    whole = (matrix.detach().double() / scaled(torch.ones_like(matrix, dtype=torch.float64), scales, grid)).round().clamp(*grid.range)
    return matrix_of(whole, scales.to(matrix.dtype), grid)


def matrix_of(whole: Tensor, scales: Tensor, grid: Grid) -> QuantizedMatrix:
    """Return the matrix of whole numbers (..., rows, columns) and ``scales`` (..., rows, groups), which keep their dtype."""
    return MATRICES[grid.bits].of_whole(whole, scales, grid)


def empty_as(shape: tuple[int, ...], grid: Grid) -> QuantizedMatrix:
    """Return a matrix of ``shape`` that is still to be loaded."""
    return MATRICES[grid.bits](grid, shape)


def dense_of(factor: Factor) -> Tensor:
    """Return the factor as a matrix of floats."""
    return factor.dense if isinstance(factor, QuantizedMatrix) else factor


def applied(factor: Factor, input: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``input`` (..., columns) times the transpose of a factor (rows, columns), plus the bias (rows,)."""
    if isinstance(factor, Int8Matrix):  # a scale for each row: x (s q)ᵀ = (x qᵀ) s
        products = functional.linear(input, factor.values.to(input.dtype)) * factor.scales.to(input.dtype)
        return products if bias is None else products + bias
    return functional.linear(input, factor.dense_in(input.dtype) if isinstance(factor, QuantizedMatrix) else factor, bias)

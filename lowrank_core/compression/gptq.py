"""GPTQ: rounding that lets the columns still to come make up for the error of those rounded before.

Notation::

    W (m, n)   matrix,  Q its rounded form,  E = W - Q
    S (n, n)   E[x xᵀ] of the inputs;  e = tr(E S Eᵀ), the mean squared error of the output
    U          upper Cholesky factor of (S + δI)⁻¹ = Uᵀ U

Columns are rounded in the order of falling S_jj. After column j, its error (w_j - q_j) / U_jj times U_jk is taken from every later
column k: the change of the columns that are still free that makes e least. Scales are those of rounding to nearest, so that both share
one grid, and of each row the better of the two is kept: e is never larger. Frantar et al., arXiv 2210.17323, §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError
from lowrank_core.files.grids import Grid
from lowrank_core.layers.quantized import QuantizedMatrix, matrix_of, scaled, scales_of
from lowrank_core.linalg import Damped

__all__ = ["gptq"]

_DAMPING = 0.01
"""δ relative to the mean of S_jj, as published."""

_BLOCK = 64
"""Columns whose corrections are gathered before they reach all later ones: one product in place of many updates."""


def gptq(matrix: Tensor, moment: Tensor, grid: Grid, stored_dtype: torch.dtype) -> QuantizedMatrix:
    """Return a matrix (m, n) on a grid, rounded with regard to the second moment S (n, n) of its inputs; float64 within.

    Args:
        stored_dtype: as for ``scales_of``; scales have the dtype of the matrix.

    Raises:
        NumericalError: NaN or Inf in either, or numbers too large for the grid.
    """
    scales = scales_of(matrix, grid, stored_dtype)
    if not torch.isfinite(moment).all():
        raise NumericalError("the second moment of its inputs holds NaN or Inf. Calibrate on other text, or round to nearest.")
    if not matrix.numel():
        return matrix_of(matrix.detach().double(), scales.to(matrix.dtype), grid)
    exact, moment = matrix.detach().to("cpu", torch.float64), moment.to("cpu", torch.float64)
    steps = scaled(torch.ones_like(exact), scales.cpu(), grid)
    nearest = (exact / steps).round().clamp(*grid.range)
    corrected = _corrected(exact, steps, moment, grid)
    errors = [(((exact - steps * whole) @ moment) * (exact - steps * whole)).sum(1) for whole in (nearest, corrected)]
    best = torch.where((errors[1] < errors[0])[:, None], corrected, nearest)
    return matrix_of(best.to(matrix.device), scales.to(matrix.dtype), grid)


def _corrected(matrix: Tensor, steps: Tensor, moment: Tensor, grid: Grid) -> Tensor:
    """Return the whole numbers (m, n) that the sequential rule chooses."""
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moment[order][:, order])
    left, steps, whole = matrix[:, order], steps[:, order], torch.empty_like(matrix)
    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        gone = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            whole[:, j] = (left[:, j] / steps[:, j]).round().clamp(*grid.range)
            gone[:, j - start] = (left[:, j] - steps[:, j] * whole[:, j]) / factor[j, j]
            left[:, j + 1 : stop] -= gone[:, j - start, None] * factor[j, j + 1 : stop]
        left[:, stop:] -= gone @ factor[start:stop, stop:]
    return whole[:, order.argsort()]


def _inverse_factor(moment: Tensor) -> Tensor:
    """Return U (n, n), upper triangular, with Uᵀ U = (S + δI)⁻¹; inputs that are always zero count as white ones."""
    inverse = Damped.of(moment, _DAMPING, "a moment for GPTQ").inverse
    upper: Tensor = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    return upper

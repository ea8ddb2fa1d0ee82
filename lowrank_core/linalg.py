"""Decompositions in float64, with one place for tolerances and for failures."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError

__all__ = ["eigenvalues", "square_root", "svd"]

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def _checked(matrix: Tensor, name: str) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise NumericalError(
            f"{name}: NaN or Inf before a decomposition. Check the weights, and run the model in float32 or bfloat16 instead of float16."
        )
    return matrix.to(torch.float64)


def svd(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), σ (k,) descending and Vᵀ (k, n) of an (m, n) matrix, k = min(m, n), in float64.

    Raises:
        NumericalError: the input isn't finite, or LAPACK did not converge; names the layer.
    """
    try:
        left, values, right = torch.linalg.svd(_checked(matrix, name), full_matrices=False)
    except LinAlgError as error:
        raise NumericalError(f"{name}: the singular value decomposition did not converge ({error}). Calibrate on more text.") from error
    return left, values, right


def _eigh(symmetric: Tensor, name: str) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(_checked(symmetric, name))
    except LinAlgError as error:
        raise NumericalError(f"{name}: the eigendecomposition did not converge ({error}). Calibrate on more text.") from error
    return values.clamp(min=0), vectors


def square_root(covariance: Tensor, name: str) -> Tensor:
    """Return the symmetric square root of a positive semi-definite (n, n) matrix; rounding below zero counts as zero."""
    values, vectors = _eigh(covariance, name)
    return (vectors * values.sqrt()) @ vectors.T


def eigenvalues(covariance: Tensor, name: str) -> Tensor:
    """Return the eigenvalues of a positive semi-definite (n, n) matrix, descending, never below zero."""
    try:
        values: Tensor = torch.linalg.eigvalsh(_checked(covariance, name))
    except LinAlgError as error:
        raise NumericalError(f"{name}: the eigendecomposition did not converge ({error}). Calibrate on more text.") from error
    return values.flip(0).clamp(min=0)

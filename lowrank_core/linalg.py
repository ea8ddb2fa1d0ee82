"""Decompositions in float64, with one place for damping and for failures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError

__all__ = ["Root", "damped_root", "eigenvalues", "invertible", "principal_directions", "square_root", "svd"]

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


@dataclass(frozen=True)
class Root:
    """Roots of a positive semi-definite metric A + δI, δ = damping · mean eigenvalue (1 where A is zero).

    Attributes:
        damped: (A + δI)^(γ/2), (n, n), or its diagonal (n,).
        inverse: (A + δI)^(-γ/2), in the same form.
        plain: A^(γ/2), in the same form.
        added: δ.
        condition: largest over smallest eigenvalue of A; infinite where A is singular up to rounding.
    """

    damped: Tensor
    inverse: Tensor
    plain: Tensor
    added: float
    condition: float


def damped_root(metric: Tensor, damping: float, name: str, power: float = 1.0) -> Root:
    """Return the roots of ``metric`` (n, n), or of a diagonal (n,), to the power γ/2; rounding below zero counts as zero.

    Raises:
        NumericalError: it isn't finite, or the eigendecomposition did not converge; names the layer.
    """
    values, vectors = (_checked(metric, name).clamp(min=0), None) if metric.ndim == 1 else _eigh(metric, name)
    mean = float(values.mean())
    added = damping * mean if mean > 0 else 1.0
    minimum, maximum = float(values.min()), float(values.max())
    raised = (values + added) ** (power / 2)

    def build_model(diagonal: Tensor) -> Tensor:
        return diagonal if vectors is None else (vectors * diagonal) @ vectors.T

    return Root(
        damped=build_model(raised),
        inverse=build_model(1 / raised),
        plain=build_model(values ** (power / 2)),
        added=added,
        condition=maximum / minimum if minimum > len(values) * torch.finfo(torch.float64).eps * maximum else float("inf"),
    )


def invertible(root: Root, name: str) -> Root:
    """Return ``root`` if its inverse means something.

    Raises:
        NumericalError: the metric is singular and was not damped; names the layer.
    """
    if root.added == 0 and root.condition == float("inf"):
        raise NumericalError(
            f"{name}: its metric is singular, and the damping is 0. Set the damping to 1e-6 or more, or calibrate on more text."
        )
    return root


def square_root(covariance: Tensor, name: str) -> Tensor:
    """Return the symmetric square root of a positive semi-definite (n, n) matrix; rounding below zero counts as zero."""
    values, vectors = _eigh(covariance, name)
    return (vectors * values.sqrt()) @ vectors.T


def principal_directions(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (n,) of a positive semi-definite (n, n) matrix, descending, and its eigenvectors as columns (n, n)."""
    values, vectors = _eigh(covariance, name)
    return values.flip(0), vectors.flip(1)


def eigenvalues(covariance: Tensor, name: str) -> Tensor:
    """Return the eigenvalues of a positive semi-definite (n, n) matrix, descending, never below zero."""
    try:
        values: Tensor = torch.linalg.eigvalsh(_checked(covariance, name))
    except LinAlgError as error:
        raise NumericalError(f"{name}: the eigendecomposition did not converge ({error}). Calibrate on more text.") from error
    return values.flip(0).clamp(min=0)

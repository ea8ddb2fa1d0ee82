"""Decompositions in float64, with one place for damping and for failures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError

__all__ = ["Damped", "eigenvalues", "principal_directions", "square_root", "svd", "times"]

_SINGLE = torch.finfo(torch.float32).eps ** 0.5
"""Relative size below zero up to which an eigenvalue is rounding of float32 products."""

_SOUND = 0.9
"""Share of δ that the smallest eigenvalue of A + δI must reach."""

_ITERATIONS = 12

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
class Damped:
    """(A + δI)^γ of a positive semi-definite A, δ = damping · mean eigenvalue (1 where A is zero).

    What needs no eigenvalues is computed without them; the rest when it is first asked for. Eigenvalues below rounding count as rounding.

    Attributes:
        plain: A (n, n), or its diagonal (n,), float64.
        added: δ.
        power: γ.
        name: of the layer, for messages.
    """

    plain: Tensor
    added: float
    power: float
    name: str

    @classmethod
    def of(cls, metric: Tensor, damping: float, name: str, power: float = 1.0) -> Damped:
        """Damp ``metric`` (n, n), or a diagonal (n,).

        Raises:
            NumericalError: it isn't finite; names the layer.
        """
        checked = _checked(metric, name)
        if checked.ndim == 1:
            checked = checked.clamp(min=0)
        mean = float((checked if checked.ndim == 1 else checked.diagonal()).mean())
        return cls(checked, damping * mean if mean > 0 else 1.0, power, name)

    @cached_property
    def matrix(self) -> Tensor:
        """(A + δI)^γ, in the form of A.

        Raises:
            NumericalError: the eigendecomposition did not converge, as in all that follows; names the layer.
        """
        return self._shifted if self.power == 1 and (self._lower is not None or not self._triangular) else self._raised(self.power)

    @property
    def _shifted(self) -> Tensor:
        """A + δI."""
        return self.plain + self.added if self.plain.ndim == 1 else self.plain + torch.diag(torch.full_like(self.plain[0], self.added))

    @cached_property
    def factor(self) -> Tensor:
        """F with F Fᵀ = (A + δI)^γ, in the form of A: lower triangular where γ = 1 and A + δI is soundly positive, else symmetric.

        Raises:
            NumericalError: an eigenvalue is below zero by more than rounding; names the layer.
        """
        return self._raised(self.power / 2) if self._lower is None else self._lower

    @cached_property
    def _lower(self) -> Tensor | None:
        """Cholesky's factor of A + δI; None where δ is no more than rounding of A, be it of the float32 products that A sums.

        No eigenvalue of A + δI is below δ where A is positive semi-definite. Fewer tokens than dimensions, or features that are much larger
        than all others, leave eigenvalues of A that rounding puts below zero; pivots don't show them, as they are no smaller than the
        smallest eigenvalue, and may be n times as large.
        """
        if not self._triangular:
            return None
        lower, failed = torch.linalg.cholesky_ex(self._shifted)
        if not failed and _smallest_eigenvalue(lower) >= _SOUND * self.added:
            return lower  # type: ignore[no-any-return]
        smallest, *_, largest = torch.linalg.eigvalsh(self.plain)
        if smallest < -_SINGLE * largest:
            raise NumericalError(f"{self.name}: its metric is no covariance (an eigenvalue is {smallest:.2g}). Calibrate again.")
        return None

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """Return Fᵀ · matrix."""
        return times(self.factor if self.factor.ndim == 1 else self.factor.T, matrix)

    def inverse_transposed_times(self, matrix: Tensor) -> Tensor:
        """Return F⁻ᵀ · matrix."""
        if self._lower is None:
            return times(self._raised(-self.power / 2), matrix)
        result: Tensor = torch.linalg.solve_triangular(self._lower.T, matrix, upper=True)
        return result

    @property
    def inverse(self) -> Tensor:
        """(A + δI)^-γ, in the form of A."""
        return self._raised(-self.power) if self._lower is None else torch.cholesky_inverse(self._lower)

    @property
    def _triangular(self) -> bool:
        eps = torch.finfo(torch.float64).eps
        return self.plain.ndim == 2 and self.power == 1 and self.added > len(self.plain) * eps * float(self.plain.trace())

    @cached_property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of A; infinite where A is singular up to rounding."""
        values = self._eigen[0] if self.plain.ndim == 1 or "_eigen" in self.__dict__ else eigenvalues(self.plain, self.name)
        minimum, maximum = float(values.min()), float(values.max())
        return maximum / minimum if minimum > _rounding(values) else float("inf")

    def invertible(self) -> Damped:
        """Return itself if its inverse means something.

        Raises:
            NumericalError: the metric is singular and was not damped; names the layer.
        """
        if self.added == 0 and self.condition == float("inf"):
            raise NumericalError(
                f"{self.name}: its metric is singular, and the damping is 0. Set the damping to 1e-6 or more, or calibrate on more text."
            )
        return self

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor | None]:
        return (self.plain, None) if self.plain.ndim == 1 else _eigh(self.plain, self.name)

    def _raised(self, power: float) -> Tensor:
        values, vectors = self._eigen
        raised = (values.clamp(min=_rounding(values)) + self.added) ** power
        return raised if vectors is None else (vectors * raised) @ vectors.T


def _smallest_eigenvalue(lower: Tensor) -> float:
    """Return that of L Lᵀ, L (n, n) lower triangular, by inverse iteration, which comes to it from above."""
    vector = torch.randn(len(lower), 1, dtype=lower.dtype, device=lower.device, generator=torch.Generator(lower.device).manual_seed(0))
    size = 1.0
    for _ in range(_ITERATIONS):
        vector = torch.cholesky_solve(vector / torch.linalg.vector_norm(vector), lower)
        size = float(torch.linalg.vector_norm(vector))
    return 1 / size


def _rounding(values: Tensor) -> float:
    """Return the size that eigenvalues ``values`` (n,) have by rounding alone."""
    return len(values) * torch.finfo(torch.float64).eps * float(values.max())


def times(factor: Tensor, matrix: Tensor) -> Tensor:
    """Return factor · matrix; a vector stands for a diagonal."""
    return factor[:, None] * matrix if factor.ndim == 1 else factor @ matrix


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

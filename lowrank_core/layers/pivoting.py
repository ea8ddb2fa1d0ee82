"""Lossless savings: a product of two factors holds r² numbers that its other numbers tell.

============= ==================================================================================
A (M, r)      a factor, its rows stacked over the matrices that share the other one
P, R          r pivot rows of A, ascending, and the M − r others, ascending
C (M − r, r)  coefficients: A[R] = C A[P]
============= ==================================================================================

``up down`` is known from ``A[P] down`` and C alone, r (M + n − r) numbers instead of r (M + n): PIFA, arXiv 2501.19090.
Column-pivoted QR of Aᵀ picks the rows, so that C stays small (entries of a few units: rounding is not amplified).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import scipy.linalg
import torch
from torch import Tensor

from lowrank_core.errors import NumericalError, RankError

__all__ = ["GaugedHeads", "PivotedFactors", "RowSelection", "fix_gauge", "gather_order", "pivot", "select_rows"]


@dataclass(frozen=True)
class RowSelection:
    """Rows of a matrix (M, r) that tell the others.

    Attributes:
        pivots: (r,) their numbers, ascending.
        rest: (M − r,) the numbers of the others, ascending.
        coefficients: (M − r, r), with ``matrix[rest] = coefficients @ matrix[pivots]``.
    """

    pivots: Tensor
    rest: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class PivotedFactors:
    """A unit ``up_i down`` in pivoted form.

    Attributes:
        rows: (r, n) the pivot rows of the stacked product; member i's are a contiguous slice.
        coefficients: (m_i − r_i, r) of each member's other rows.
        pivots: (r_i,) of each member, ascending, counted from its own first row.
    """

    rows: Tensor
    coefficients: tuple[Tensor, ...]
    pivots: tuple[Tensor, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of each member's slice of ``rows``."""
        counts = [len(own) for own in self.pivots]
        return (0, *accumulate(counts[:-1]))

    @property
    def largest_coefficient(self) -> float:
        """max |C|: by how much rounding of the pivot rows can grow."""
        return max((float(own.abs().max()) for own in self.coefficients if own.numel()), default=0.0)


@dataclass(frozen=True)
class GaugedHeads:
    """Value and output projections in the basis where r columns of each group's value projection are the identity.

    Attributes:
        rest: (groups, r, n − r) the other columns, ascending.
        pivots: (groups, r) which columns are the identity, ascending.
        biases: (groups, r), or None.
        outputs: (heads, d_out, r).
    """

    rest: Tensor
    pivots: Tensor
    biases: Tensor | None
    outputs: Tensor


def select_rows(matrix: Tensor, name: str = "matrix") -> RowSelection:
    """Return r rows of an (M, r) float64 matrix that the others are combinations of, and the combinations.

    From Aᵀ Π = Q [R₁ R₂]: C = (R₁⁻¹ R₂)ᵀ. Where A has a lower rank than columns, the leading block of R does the same.
    A change of basis A T leaves C alone; columns are brought to one length first, so that none counts as rounding.

    Raises:
        RankError: fewer rows than columns.
        NumericalError: NaN or Inf; names the matrix.
    """
    rows, rank = matrix.shape
    if not 1 <= rank <= rows:
        raise RankError(f"{name}: rank must be in [1, {rows}], got {rank}. Lower the rank, or leave the matrix dense.")
    if not torch.isfinite(matrix).all():
        raise NumericalError(f"{name}: NaN or Inf in its factors. Calibrate on more text, or lower the rank.")
    matrix = matrix.to(torch.float64)
    lengths = torch.linalg.vector_norm(matrix, dim=0)
    scaled = matrix / torch.where(lengths > 0, lengths, 1.0)
    triangle, permutation = (torch.from_numpy(part) for part in scipy.linalg.qr(scaled.T.numpy(), mode="r", pivoting=True))
    diagonal = triangle.diagonal().abs()
    known = int((diagonal > rows * torch.finfo(torch.float64).eps * diagonal[0]).sum())
    solved = torch.zeros(rows - rank, rank, dtype=torch.float64)
    solved[:, :known] = torch.linalg.solve_triangular(triangle[:known, :known], triangle[:known, rank:], upper=True).T
    pivots, by_pivot = permutation[:rank].long().sort()
    rest, by_rest = permutation[rank:].long().sort()
    return RowSelection(pivots, rest, solved[by_rest][:, by_pivot])


def pivot(ups: Sequence[Tensor], down: Tensor, name: str = "matrix") -> PivotedFactors:
    """Return the pivoted form of the matrices ``up_i down``; ``ups`` (m_i, r) and ``down`` (r, n) in float64.

    Raises:
        RankError: the rank is larger than the rows of all members together.
        NumericalError: NaN or Inf; names the matrix.
    """
    stacked = torch.cat(list(ups))
    selection = select_rows(stacked, name)
    bounds = torch.tensor((0, *accumulate(len(up) for up in ups)))
    firsts, lasts = torch.searchsorted(selection.pivots, bounds).unfold(0, 2, 1).T.tolist()
    own = tuple(selection.pivots[a:b] - start for a, b, start in zip(firsts, lasts, bounds, strict=False))
    sizes = [len(up) - len(pivots) for up, pivots in zip(ups, own, strict=True)]
    return PivotedFactors(stacked[selection.pivots] @ down, torch.split(selection.coefficients, sizes), own)


def gather_order(pivots: Tensor, size: int) -> Tensor:
    """Return (..., size): where each row stands in the list of the pivots, then the others, both ascending.

    ``torch.cat([matrix[pivots], matrix[rest]])[gather_order(pivots, len(matrix))] == matrix``, for ascending ``pivots`` (..., r).
    Anything else in ``pivots`` (unread memory, a damaged file) still gives numbers below ``size``.
    """
    rows = torch.arange(size, dtype=pivots.dtype, device=pivots.device).expand(*pivots.shape[:-1], size).contiguous()
    before = torch.searchsorted(pivots, rows)
    is_pivot = torch.searchsorted(pivots, rows, right=True) > before
    return torch.where(is_pivot, before, pivots.shape[-1] + rows - before).clamp(0, size - 1)


def fix_gauge(values: Tensor, biases: Tensor | None, outputs: Tensor, name: str = "value heads") -> GaugedHeads:
    """Return the same value and output projections with the identity in r columns of each group's value projection.

    V″_g = A_g⁻¹ V_g, b″_g = A_g⁻¹ b_g and O″_h = O_h A_g with A_g = V_g[:, P_g]; head h belongs to group h // (heads / groups).
    Arguments: ``values`` (groups, r, n), ``biases`` (groups, r), ``outputs`` (heads, d_out, r).

    Raises:
        RankError: more value dimensions than inputs.
        NumericalError: NaN or Inf; or the values of a group have a lower rank than r, and its bias is none of them.
    """
    chosen = [select_rows(value.T, f"{name}, group {group}") for group, value in enumerate(values)]
    bases = torch.stack([value[:, rows.pivots] for value, rows in zip(values, chosen, strict=True)])
    gauged = None if biases is None else torch.stack([_solve(basis, bias, name) for basis, bias in zip(bases, biases, strict=True)])
    per_head = bases.repeat_interleave(len(outputs) // len(values), dim=0)
    return GaugedHeads(
        rest=torch.stack([rows.coefficients.T for rows in chosen]),
        pivots=torch.stack([rows.pivots for rows in chosen]),
        biases=gauged,
        outputs=outputs @ per_head,
    )


def _solve(basis: Tensor, bias: Tensor, name: str) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(basis, bias[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(basis @ solution, bias, rtol=1e-8, atol=1e-8 * float(bias.abs().max())):
        raise NumericalError(f"{name}: the values have a lower rank than {len(bias)}, and their bias lies outside. Lower the rank.")
    return solution

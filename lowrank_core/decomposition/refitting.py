"""Alternating least squares: one factor refitted while the other is fixed.

Notation::

    T (M, n), U (M, r), V (r, n)   target and factors; L (M, M) and R (n, n): roots of the row and of the column metric
    J                              ‖L (T - U V) R‖²
    U given V                      T R (V R)⁺, whatever L is
    V given U                      (L U)⁺ L T, whatever R is

Each turn minimises J over its factor, so J never rises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["refitted"]

_ROBUST = "gelsy"
"""LAPACK's driver that takes factors of a lower rank than they have columns."""

Weigh = Callable[[Tensor], Tensor]


def refitted(target: Tensor, up: Tensor, down: Tensor, weigh_rows: Weigh, weigh_columns: Weigh, steps: int) -> tuple[Tensor, Tensor]:
    """Return ``up`` (M, r) and ``down`` (r, n) after ``steps`` turns, the first of ``up``; all float64.

    Args:
        target: T (M, n).
        weigh_rows: L · of an (M, k) matrix; weigh_columns: · R of a (k, n) matrix.
    """
    for step in range(steps):
        if step % 2 == 0:
            up = _solved(weigh_columns(down).T, weigh_columns(target).T).T
        else:
            down = _solved(weigh_rows(up), weigh_rows(target))
    return up, down


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the X that minimises ‖matrix X - right‖."""
    result: Tensor = torch.linalg.lstsq(matrix, right, driver=_ROBUST).solution
    return result

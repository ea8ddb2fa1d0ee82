"""Exact integer counts of parameters, bytes and FLOPs; nothing here knows torch.

Notation (as in ARCHITECTURE: y = W x + b, W of shape d_out x d_in)::

    dense        d_out·d_in (+ d_out with a bias)
    factored     r·(d_out + d_in) (+ d_out with a bias)
    break-even   the largest r at which the factors still cost less than W

``compression ratio`` always means the fraction of parameters *removed*, in [0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lowrank_core.errors import BudgetError, RankError

__all__ = ["STORAGES", "MatrixShape", "allocated_parameters", "budget_for_ratio", "compression_ratio", "rank_for_ratio"]

STORAGES = ("factored",)
FLOAT_SLACK = 1e-6
"""Parameters; absorbs the rounding of ``(1 - ratio) * count``, so that a ratio like 0.3 costs no whole rank."""


@dataclass(frozen=True, order=True)
class MatrixShape:
    """A compressible linear map, seen as a price list: what each rank costs in parameters.

    Attributes:
        name: dotted path of the module in the model.
        kind: type of the module, shared by depth (``q_proj``).
        depth: index of its block, from 0.
        d_out: output width (rows of W).
        d_in: input width (columns of W).
        bias: whether the dense module has one.
        adds_bias: whether the factored module has one all the same (a centred basis adds it; it is counted).
    """

    name: str
    kind: str
    depth: int
    d_out: int
    d_in: int
    bias: bool = False
    adds_bias: bool = False

    @property
    def dense_parameters(self) -> int:
        return self.d_out * self.d_in + self.d_out * self.bias

    @property
    def rank_step(self) -> int:
        """Parameters that one more rank costs."""
        return self.d_out + self.d_in

    @property
    def fixed_parameters(self) -> int:
        """Parameters of the factored form that do not depend on the rank: its bias."""
        return self.d_out * (self.bias or self.adds_bias)

    @property
    def max_rank(self) -> int:
        return min(self.d_out, self.d_in)

    @property
    def break_even_rank(self) -> int:
        """The largest rank whose factors cost less than the dense matrix; 0 if none does."""
        affordable = (self.dense_parameters - self.fixed_parameters - 1) // self.rank_step
        return max(0, min(self.max_rank, affordable))

    def parameters(self, rank: int | None) -> int:
        """Return the parameters stored at ``rank``; None stands for the dense matrix.

        Raises:
            RankError: rank outside [1, min(d_out, d_in)].
        """
        if rank is None:
            return self.dense_parameters
        if not 1 <= rank <= self.max_rank:
            raise RankError(f"{self.name}: rank must be in [1, {self.max_rank}], got {rank}. Lower it, or leave the layer dense (null).")
        return rank * self.rank_step + self.fixed_parameters

    def rank_for_parameters(self, parameters: float) -> int | None:
        """Return the largest rank that costs at most ``parameters``, at least 1; None where dense fits, too."""
        if parameters >= self.dense_parameters or self.break_even_rank == 0:
            return None
        rank = math.floor((parameters - self.fixed_parameters + FLOAT_SLACK) / self.rank_step)
        return max(1, min(rank, self.break_even_rank))

    def flops_per_token(self, rank: int | None) -> int:
        """Return multiply-adds counted as two operations, biases left out."""
        return 2 * (self.d_out * self.d_in if rank is None else rank * self.rank_step)


def rank_for_ratio(d_out: int, d_in: int, compression_ratio: float) -> int:
    """Return the largest rank whose two factors fit the kept parameters (0 if not even one does)."""
    kept = math.floor((1 - compression_ratio) * d_out * d_in + FLOAT_SLACK)
    return kept // (d_out + d_in)


def budget_for_ratio(matrices: Iterable[MatrixShape], compression_ratio: float) -> int:
    """Return the integer count of parameters allowed to ``matrices`` together.

    Raises:
        BudgetError: the ratio is outside [0, 1).
    """
    if not 0 <= compression_ratio < 1:
        raise BudgetError(f"compression ratio must be in [0, 1), got {compression_ratio:g}.")
    dense = sum(matrix.dense_parameters for matrix in matrices)
    return math.floor((1 - compression_ratio) * dense + FLOAT_SLACK)


def allocated_parameters(matrices: Iterable[MatrixShape], ranks: Mapping[str, int | None]) -> int:
    """Return the parameters of ``matrices`` stored at ``ranks`` (a missing name is dense)."""
    return sum(matrix.parameters(ranks.get(matrix.name)) for matrix in matrices)


def compression_ratio(before: int, after: int) -> float:
    """Return the fraction of parameters removed."""
    return 1 - after / before

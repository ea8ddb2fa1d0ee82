"""Plain singular value decomposition of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.accounting import MatrixShape
from lowrank_core.bases.base import FactorBasis
from lowrank_core.linalg import svd
from lowrank_core.moments import InputStatistics

__all__ = ["WEIGHT_SVD", "WeightSvd"]


@dataclass(frozen=True)
class WeightSvd:
    """W = U Σ Vᵀ, stored as U √Σ and √Σ Vᵀ; e_r = Σ_{i>r} σ_i² = ‖W - W_r‖_F². Eckart & Young 1936."""

    name: str = "weight_svd"
    label: str = "Weight SVD"
    reference: str = "Eckart & Young 1936"
    needs_data: bool = False
    adds_bias: bool = False

    def factorize(self, shape: MatrixShape, weight: Tensor, bias: Tensor | None, statistics: InputStatistics) -> FactorBasis:
        left, values, right = svd(weight, shape.name)
        root = values.sqrt()
        return FactorBasis(shape, left * root, root[:, None] * right, bias, None, None, tail_sums(values.square()))


def tail_sums(energies: Tensor) -> Tensor:
    """Return (Σ_{i>=0} e, Σ_{i>=1} e, …, 0): what is left after keeping 0, 1, …, k directions."""
    tails = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


WEIGHT_SVD = WeightSvd()

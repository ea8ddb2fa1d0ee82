"""The paper's basis: principal components of the output features, with the pooled covariance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowrank_core.accounting import MatrixShape
from lowrank_core.bases.base import FactorBasis
from lowrank_core.bases.weight_svd import tail_sums
from lowrank_core.linalg import square_root, svd
from lowrank_core.moments import InputStatistics

__all__ = ["POOLED_FEATURE", "PooledFeature"]


@dataclass(frozen=True)
class PooledFeature:
    """W C Wᵀ = U Λ Uᵀ with the pooled covariance C; factors U_r and U_rᵀ W; b' = b + (I - U_r U_rᵀ) W μ.

    e_r = Σ_{i>r} λ_i, the expected squared error of the output under C. Bolaco, arXiv 2405.10616, §3.1.
    U comes from the singular vectors of W C^½: orthonormal to rounding also where λ is tiny, and no larger than min(m, n).
    """

    name: str = "pooled_feature"
    label: str = "Pooled features (Bolaco)"
    reference: str = "arXiv 2405.10616"
    needs_data: bool = True
    adds_bias: bool = True

    def factorize(self, shape: MatrixShape, weight: Tensor, bias: Tensor | None, statistics: InputStatistics) -> FactorBasis:
        left, values, _ = svd(weight @ square_root(statistics.pooled, shape.name), shape.name)
        mean = statistics.mean
        return FactorBasis(shape, left, left.T @ weight, bias, weight @ mean, mean, tail_sums(values.square()))


POOLED_FEATURE = PooledFeature()

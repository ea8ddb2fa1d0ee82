"""The paper's basis: principal components of the output features, with the pooled covariance."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

__all__ = ["POOLED_FEATURE", "PooledFeature"]


@dataclass(frozen=True)
class PooledFeature(ErrorMetric):
    """e = tr(ΔW C ΔWᵀ) with the pooled covariance C: W_r = U_r U_rᵀ W for W C Wᵀ = U Λ Uᵀ. Bolaco, arXiv 2405.10616, §3.1.

    The bias b' = b + (I - U_r U_rᵀ) W μ keeps the mean output exact.
    """

    name: str = "pooled_feature"
    label: str = "Pooled features (Bolaco)"
    reference: str = "arXiv 2405.10616"
    centred: bool = True

    def metric(self, layer_data: LayerData) -> Metric:
        return Metric(columns=layer_data.inputs.pooled)


POOLED_FEATURE = PooledFeature()

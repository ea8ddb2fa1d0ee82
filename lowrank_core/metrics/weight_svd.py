"""Plain singular value decomposition of the weight."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

__all__ = ["WEIGHT_SVD", "WeightSvd"]


@dataclass(frozen=True)
class WeightSvd(ErrorMetric):
    """e = ‖ΔW‖_F². Eckart & Young 1936."""

    name: str = "weight_svd"
    label: str = "Weight SVD"
    reference: str = "Eckart & Young 1936"
    needs_data: bool = False

    def metric(self, layer_data: LayerData) -> Metric:
        return Metric()


WEIGHT_SVD = WeightSvd()

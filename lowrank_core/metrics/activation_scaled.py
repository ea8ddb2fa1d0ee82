"""Columns scaled by the mean absolute activation."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

__all__ = ["ACTIVATION_SCALED", "ActivationScaled"]


@dataclass(frozen=True)
class ActivationScaled(ErrorMetric):
    """e = ‖ΔW diag(s)‖_F², s_j = (mean |x_j|)^α. ASVD, arXiv 2312.05821, with its α = ½."""

    alpha: float = 0.5
    name: str = "activation_scaled"
    label: str = "Activation-scaled (ASVD)"
    reference: str = "arXiv 2312.05821"

    def metric(self, layer_data: LayerData) -> Metric:
        return Metric(columns=layer_data.inputs.absolute_mean ** (2 * self.alpha))


ACTIVATION_SCALED = ActivationScaled()

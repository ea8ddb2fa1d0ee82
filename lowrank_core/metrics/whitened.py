"""Whitened inputs: minimum error of the outputs on the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

__all__ = ["WHITENED", "Whitened"]


@dataclass(frozen=True)
class Whitened(ErrorMetric):
    """e = E‖ΔW x‖² = tr(ΔW S ΔWᵀ): W_r = [W S^½]_r S^-½. SVD-LLM, arXiv 2403.07378."""

    name: str = "whitened"
    label: str = "Whitened (SVD-LLM)"
    reference: str = "arXiv 2403.07378"

    def metric(self, layer_data: LayerData) -> Metric:
        return Metric(columns=layer_data.inputs.second_moment)


WHITENED = Whitened()

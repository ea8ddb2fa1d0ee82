"""Both sides weighed: inputs by their second moment, outputs by how much the loss minds."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

__all__ = ["TWO_SIDED", "TWO_SIDED_HALF", "TwoSided"]


@dataclass(frozen=True)
class TwoSided(ErrorMetric):
    """e = ½ tr(G^γ ΔW C ΔWᵀ), with G = E[g gᵀ] of the gradients g at the output. IO-SVD, arXiv 2605.15626; K-FAC, 1503.05671.

    With γ = 1 it is K-FAC's second-order estimate of the KL divergence to the dense model, in nats per token: comparable across
    layers. C is the covariance of the inputs, and the bias keeps the mean output exact (docs/methods.md §1, Centring).
    """

    gamma: float = 1.0
    name: str = "two_sided"
    label: str = "Two-sided (K-FAC)"
    reference: str = "arXiv 2605.15626"
    needs_gradients: bool = True
    centred: bool = True
    comparable: bool = True

    def metric(self, layer_data: LayerData) -> Metric:
        assert layer_data.outputs is not None
        columns = layer_data.inputs.sample if self.centred else layer_data.inputs.second_moment
        return Metric(rows=layer_data.outputs.gradient, columns=columns, row_power=self.gamma, scale=0.5)


TWO_SIDED = TwoSided()
TWO_SIDED_HALF = TwoSided(gamma=0.5, name="two_sided_half", label="Two-sided, γ = ½ (IO-SVD)", comparable=False)

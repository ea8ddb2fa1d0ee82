"""Both sides weighed: inputs by their second moment, outputs by how much the loss minds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TWO_SIDED", "TWO_SIDED_HALF", "TWO_SIDED_UNCENTRED", "TwoSided"]


@dataclass(frozen=True)
class TwoSided(ErrorMetric):
    """e = ½ tr(G^γ ΔW C ΔWᵀ), with G = E[g gᵀ] of the gradients g at the output. IO-SVD, arXiv 2605.15626; K-FAC, 1503.05671.

    With γ = 1 it is K-FAC's second-order estimate of the KL divergence to the dense model, in nats per token: comparable across
    layers. C is the covariance of the inputs, and the bias keeps the mean output exact (docs/methods.md §1, Centring); uncentred it is
    their second moment, and there is no bias. Either side may be shrunk to a multiple of the identity (``shrunk``).
    """

    gamma: float = 1.0
    input_shrinkage: float = 0.0
    gradient_shrinkage: float = 0.0
    name: str = "two_sided"
    label: str = "Two-sided (K-FAC)"
    reference: str = "arXiv 2605.15626"
    needs_gradients: bool = True
    centred: bool = True
    comparable: bool = True

    def metric(self, layer_data: LayerData) -> Metric:
        assert layer_data.outputs is not None
        columns = layer_data.inputs.sample if self.centred else layer_data.inputs.second_moment
        return Metric(
            rows=_shrunk(layer_data.outputs.gradient, self.gradient_shrinkage),
            columns=_shrunk(columns, self.input_shrinkage),
            row_power=self.gamma,
            scale=0.5,
        )


def _shrunk(moment: Tensor, share: float) -> Tensor:
    """Return (1 - α) M + α · mean(diag M) · I: the mean eigenvalue stays; M itself at α = 0."""
    if share == 0:
        return moment
    result = moment * (1 - share)
    result.diagonal().add_(share * moment.diagonal().mean())
    return result


TWO_SIDED = TwoSided()
TWO_SIDED_HALF = TwoSided(gamma=0.5, name="two_sided_half", label="Two-sided, γ = ½ (IO-SVD)", comparable=False)
TWO_SIDED_UNCENTRED = TwoSided(
    centred=False, name="two_sided_uncentred", label="Two-sided, uncentred (KFAC-SVD)", reference="LEMS, ICML 2026", comparable=True
)

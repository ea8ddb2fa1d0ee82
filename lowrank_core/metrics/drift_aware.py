"""Block by block: the dense output, from the input that the compressed blocks before really give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_core.metrics.base import ErrorMetric, LayerData
from lowrank_core.metrics.stacks import Wrapper
from lowrank_core.metrics.whitened import WHITENED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DRIFT_AWARE", "DriftAware"]


@dataclass(frozen=True)
class DriftAware(Wrapper):
    """[W ((1-β) S' + β C×) S'^-½]_r S'^-½: targets W x from x'. β = 1 is AA-SVD, arXiv 2604.02119; between, SAES-SVD's mixture.

    S' and C× are the moments of the inner basis, covariances where it is centred.
    """

    inner: ErrorMetric = WHITENED
    title: str = "drift_aware"
    words: str = "Drift-aware"
    reference: str = "arXiv 2604.02119"
    beta: float = 1.0
    sequential: bool = True

    def target_moment(self, layer_data: LayerData) -> Tensor | None:
        """Return (1-β) S' + β C× (n, n); None where the inputs did not drift."""
        if layer_data.cross is None:
            return None
        own = layer_data.inputs.sample if self.centred else layer_data.inputs.second_moment
        return (1 - self.beta) * own + self.beta * layer_data.cross


DRIFT_AWARE = DriftAware()

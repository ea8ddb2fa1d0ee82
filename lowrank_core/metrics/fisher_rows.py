"""Rows weighed by the Fisher information of their weights."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.metrics.base import ErrorMetric, LayerData, Metric

__all__ = ["FISHER_ROWS", "FisherRows"]


@dataclass(frozen=True)
class FisherRows(ErrorMetric):
    """e = Σ_i f_i ‖ΔW_i‖², f_i = Σ_j F_ij with the diagonal F of the weight's Fisher information. FWSVD, arXiv 2207.00112.

    The paper takes F from the gradients of a task's labels; ours are sampled from the model (the true Fisher of its predictions).
    """

    name: str = "fisher_rows"
    label: str = "Fisher-weighted rows (FWSVD)"
    reference: str = "arXiv 2207.00112"
    needs_data: bool = False
    needs_gradients: bool = True

    def metric(self, layer_data: LayerData) -> Metric:
        assert layer_data.outputs is not None
        return Metric(rows=layer_data.outputs.fisher_rows)


FISHER_ROWS = FisherRows()

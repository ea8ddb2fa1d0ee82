"""Error metrics: ways to weigh the error of a matrix, which fix the order of directions for every rank.

Notation::

    W (m, n)   weight,  m = d_out, n = d_in;  ΔW = W - W_r
    P (m, m)   row metric,  C (n, n)  column metric;  both positive semi-definite, a vector stands for a diagonal
    e          tr(P^γ ΔW C ΔWᵀ): the error that a basis minimises at every rank

Nothing here imports torch at run time, so that pages can list the methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_core.parameters import MatrixShape

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_core.statistics.moments import InputStatistics, OutputStatistics

__all__ = ["ErrorMetric", "Grouping", "Metric", "LayerData"]

Grouping = tuple[tuple[MatrixShape, ...], ...]


@dataclass(frozen=True)
class LayerData:
    """One matrix, with what calibration learned of both its sides.

    Attributes:
        shape: the matrix.
        weight: W (m, n), float64.
        bias: b (m,), float64, or None.
        inputs: statistics of its input; of the compressed model's input x' in a sequential compression.
        outputs: moments of the loss gradient at its output; None unless the basis needs gradients.
        cross: C× = E[x x'ᵀ] (n, n) of the dense and the compressed model's input, centred where the basis is; None outside a
            sequential compression.
        dense_mean: E[x] (n,) of the dense model's input in a sequential compression; None where it is the mean of ``inputs``.
    """

    shape: MatrixShape
    weight: Tensor
    bias: Tensor | None
    inputs: InputStatistics
    outputs: OutputStatistics | None = None
    cross: Tensor | None = None
    dense_mean: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """e = scale · tr(P^γ ΔW C ΔWᵀ).

    Attributes:
        rows: P (m, m) or (m,); None is the identity.
        columns: C (n, n) or (n,); None is the identity.
        row_power: γ.
        scale: ½ where e estimates the KL divergence, else 1.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    row_power: float = 1.0
    scale: float = 1.0


class ErrorMetric(ABC):
    """A metric of docs/methods.md §3; by default without gradients, sequence and bias, one matrix at a time.

    Attributes:
        needs_data: whether it needs statistics of the inputs; needs_gradients: moments of the output gradients.
        sequential: whether it compresses block by block, with statistics of the blocks compressed before.
        refit_steps: least-squares turns that refit the dense model's factors to the drifted input; 0 where they are decomposed again.
        centred: whether C is a covariance: a compressed matrix then has a bias, which keeps the mean output exact.
        comparable: whether errors of different matrices are in one unit (estimated KL), so that ranks can be traded between them.
    """

    name: str
    label: str
    reference: str
    needs_data: bool = True
    needs_gradients: bool = False
    sequential: bool = False
    refit_steps: int = 0
    centred: bool = False
    comparable: bool = False

    def grouping(self, shapes: Sequence[MatrixShape]) -> Grouping:
        """Return which matrices share one rank and one factor on their input side."""
        return tuple((shape,) for shape in shapes)

    @abstractmethod
    def metric(self, layer_data: LayerData) -> Metric:
        """Return how an error of this matrix is weighed."""

    def target_moment(self, layer_data: LayerData) -> Tensor | None:
        """Return K (n, n) where the matrix to approximate is W K C⁻¹ instead of W (a basis that corrects drift), else None."""
        return None

"""Stacks: matrices that share the factor on their input side.

The rows of the members, each weighed as its own basis says, are decomposed together: [L_1 W_1; L_2 W_2; …] C^½ = U Σ Vᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from lowrank_core.metrics.base import ErrorMetric, Grouping, LayerData, Metric
from lowrank_core.metrics.weight_svd import WEIGHT_SVD
from lowrank_core.metrics.whitened import WHITENED
from lowrank_core.parameters import MatrixShape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CROSS_LAYER", "DATA_FREE_JOINT", "SHARED_INPUT", "CrossLayer", "DataFreeJoint", "SharedInput", "Wrapper", "by_input"]

_TRAITS = ("needs_data", "needs_gradients", "sequential", "refit_steps", "centred", "comparable")


@dataclass(frozen=True)
class Wrapper(ErrorMetric):
    """A basis that changes one thing about another; its name is ``title``, and ``title:other`` around another than its ``usual`` one.

    It has the traits of the other, but for those that are fields of its own.
    """

    inner: ErrorMetric
    title: str
    words: str
    reference: str
    usual: ClassVar[str] = "whitened"

    def __post_init__(self) -> None:
        name = self.title if self.inner.name == self.usual else f"{self.title}:{self.inner.name}"
        own = {field.name for field in fields(self)}
        inherited = {trait: getattr(self.inner, trait) for trait in _TRAITS if trait not in own}
        for trait, value in {"name": name, "label": f"{self.words}, {self.inner.label}", **inherited}.items():
            object.__setattr__(self, trait, value)

    def grouping(self, shapes: Sequence[MatrixShape]) -> Grouping:
        return self.inner.grouping(shapes)

    def metric(self, layer_data: LayerData) -> Metric:
        return self.inner.metric(layer_data)

    def target_moment(self, layer_data: LayerData) -> Tensor | None:
        return self.inner.target_moment(layer_data)


def by_input(shapes: Sequence[MatrixShape]) -> Grouping:
    """Return the matrices that read the same input, together."""
    groups: dict[str, list[MatrixShape]] = {}
    for shape in shapes:
        groups.setdefault(shape.input_group or shape.name, []).append(shape)
    return tuple(map(tuple, groups.values()))


@dataclass(frozen=True)
class SharedInput(Wrapper):
    """q, k, v (or gate, up) read one input: one down-projection for all, an up-projection for each."""

    inner: ErrorMetric = WHITENED
    title: str = "shared_input"
    words: str = "Shared input"
    reference: str = "same-input stacking"

    def grouping(self, shapes: Sequence[MatrixShape]) -> Grouping:
        return by_input(shapes)


@dataclass(frozen=True)
class CrossLayer(Wrapper):
    """The same module type of ``layers`` neighbouring blocks, their metrics summed. Basis Sharing, arXiv 2410.03765."""

    inner: ErrorMetric = WHITENED
    title: str = "cross_layer"
    words: str = "Basis Sharing"
    reference: str = "arXiv 2410.03765"
    layers: int = 2

    def grouping(self, shapes: Sequence[MatrixShape]) -> Grouping:
        groups: dict[tuple[str, int, int], list[MatrixShape]] = {}
        for shape in shapes:
            groups.setdefault((shape.kind, shape.d_in, shape.depth // self.layers), []).append(shape)
        return tuple(map(tuple, groups.values()))


@dataclass(frozen=True)
class DataFreeJoint(SharedInput):
    """Rank-k approximation of the stacked weights themselves, without any data. arXiv 2402.16319."""

    usual: ClassVar[str] = "weight_svd"
    inner: ErrorMetric = WEIGHT_SVD
    title: str = "data_free_joint"
    words: str = "Data-free joint rank-k"
    reference: str = "arXiv 2402.16319"


SHARED_INPUT = SharedInput()
CROSS_LAYER = CrossLayer()
DATA_FREE_JOINT = DataFreeJoint()

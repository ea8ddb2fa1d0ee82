"""A linear layer that stays one matrix, on a grid of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank_core.layers.base import CompressedModule, Entry, parameter_like
from lowrank_core.layers.quantized import Factor, applied, dense_of

__all__ = ["DenseLinear"]


class DenseLinear(CompressedModule):
    """y = matrix x + bias, with ``matrix`` (out_features, in_features): a parameter until it is quantised."""

    form: ClassVar[str] = "dense"
    factors: ClassVar[tuple[str, ...]] = ("matrix",)
    matrix: Factor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, min(in_features, out_features)
        self.matrix = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def of(cls, matrix: Tensor, bias: Tensor | None) -> DenseLinear:
        """Return a layer with a copy of ``matrix`` (out_features, in_features) and of ``bias`` (out_features,)."""
        with torch.device("meta"):
            layer = cls(matrix.shape[1], matrix.shape[0], bias=bias is not None)
        layer.matrix = parameter_like(matrix, matrix)
        layer.bias = None if bias is None else parameter_like(bias, bias)
        return layer

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> DenseLinear:
        layer = cls(shape[1], shape[0], bias=entry.flag("bias"))._as_told(entry)
        if layer.grid is None:
            entry.refuse("grid", "a dense layer is listed where it is quantised")
        return layer

    @property
    def weight(self) -> Tensor:
        return dense_of(self.matrix)

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        return {"form": self.form, "bias": self.bias is not None, **self._grid_entry()}

    def forward(self, input: Tensor) -> Tensor:
        return applied(self.matrix, input, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

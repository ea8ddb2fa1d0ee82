"""Projections that an architecture holds in one matrix, as linear layers of their own: queries, keys and values, or gate and up.

Notation::

    M, n        rows and columns of the fused matrix;  c   chunks of equal length that its rows come in: 1 for [q | k | v] (GPT-2), one for
                each head or group of heads for q k v q k v … (GPT-NeoX, Falcon), one for each row for gate up gate up …
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_core.errors import ModelError
from lowrank_core.models.unrolled import Unrolled, as_native, linear_layer, put, replace_module, stripped

__all__ = ["Layout", "SplitProjection", "layouts_of", "split_fused"]


@dataclass(frozen=True)
class Layout:
    """Order of a fused projection's rows.

    Attributes:
        parts: (name, rows) of each part, in the order that they have in a chunk.
        chunks: c; each has an equal share of every part.
    """

    parts: tuple[tuple[str, int], ...]
    chunks: int = 1

    @classmethod
    def from_mapping(cls, layer: str, entry: object) -> Layout:
        """Return the layout that ``to_mapping`` wrote.

        Raises:
            ModelError: it is none.
        """
        try:
            assert isinstance(entry, Mapping)
            result = cls(tuple((str(name), rows) for name, rows in entry["parts"]), entry["chunks"])
            names = set(result.names)
            assert len(names) == len(result.parts) > 0
            assert all(map(str.isidentifier, names))
            counts = (result.chunks, *(rows for _, rows in result.parts))
            assert all(type(count) is int and count > 0 and count % result.chunks == 0 for count in counts)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"model: config.json doesn't say how the rows of {layer!r} are divided. Export the model again.") from error
        return result

    def to_mapping(self) -> dict[str, object]:
        """Return the layout ready for JSON."""
        return {"parts": [list(part) for part in self.parts], "chunks": self.chunks}  # a mapping would be sorted by transformers

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    @property
    def rows(self) -> int:
        """M."""
        return sum(rows for _, rows in self.parts)

    def divided(self, fused: Tensor) -> dict[str, Tensor]:
        """Return name -> rows of each part (rows, …) of ``fused`` (M, …)."""
        by_chunk = torch.split(torch.unflatten(fused, 0, (self.chunks, -1)), [rows // self.chunks for _, rows in self.parts], dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(self.names, by_chunk, strict=True)}

    def joined(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Return the parts as one, the inverse of ``divided`` along ``dim`` (negative)."""
        if self.chunks == 1:
            return torch.cat(list(parts), dim)
        return torch.cat([torch.unflatten(part, dim, (self.chunks, -1)) for part in parts], dim).flatten(dim - 1, dim)


class SplitProjection(Unrolled):
    """A fused projection as linear layers that read one input; their outputs are joined in the order of its rows."""

    matrices = ("weight",)

    def __init__(self, native: nn.Module, layout: Layout) -> None:
        """Take copies of the matrix and bias of ``native``, an ``nn.Linear`` or a ``Conv1D`` of M outputs."""
        super().__init__()
        self.layout = layout
        self.__dict__["native"] = stripped(native, ("weight", "bias"))  # no submodule: it would look like a linear layer without a matrix
        weight, bias = native.weight, native.bias
        assert isinstance(weight, Tensor)
        matrices = layout.divided(weight.T if isinstance(native, Conv1D) else weight)
        biases = layout.divided(bias) if isinstance(bias, Tensor) else {}
        for name, matrix in matrices.items():
            self.add_module(name, linear_layer(matrix, biases.get(name), weight))

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return tuple(self.get_submodule(name) for name in self.layout.names)

    @property
    def weight(self) -> Tensor:
        """The fused matrix as the architecture stores it; some classes ask for its dtype."""
        matrix = self.layout.joined([_weight(part) for part in self.linears], -2)
        return matrix.T if isinstance(self.native, Conv1D) else matrix

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layout.joined([part(inputs) for part in self.linears], -1)

    def again(self, native: nn.Module) -> Self:
        return type(self)(native, self.layout)

    def rolled(self) -> nn.Module:
        native = copy.deepcopy(self.native)
        put(native, "weight", self.weight)
        biases = [part.bias for part in self.linears if isinstance(part.bias, Tensor)]
        if biases:
            put(native, "bias", self.layout.joined(biases, -1))
        return as_native(native)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def split_fused(model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace the fused projections of these names by linear layers, in place.

    Raises:
        ModelError: the architecture has no linear layer of that name, or not with so many outputs.
    """
    for name, layout in layouts.items():
        try:
            native = model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"model: config.json divides the layer {name!r}, which this architecture has not.") from error
        if not isinstance(native, nn.Linear | Conv1D) or native.weight.shape[isinstance(native, Conv1D)] != layout.rows:
            raise ModelError(
                f"model: config.json divides {name!r}, which is no linear layer of {layout.rows:,} outputs in this architecture."
            )
        replace_module(model, name, SplitProjection(native, layout))


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Return dotted path -> layout of each fused projection that is held as linear layers."""
    return {name: child.layout for name, child in model.named_modules() if isinstance(child, SplitProjection)}

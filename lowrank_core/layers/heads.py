"""Value and output projections of attention whose heads carry fewer dimensions than they have.

============ ===================================================================================
n, r         inputs of the value projection; dimensions that each head carries (≤ head_dim)
V_g (r, n)   value projection of the group g: several query heads may read one group
O_h (d, r)   output projection of head h, which reads group h // (heads / groups)
============ ===================================================================================

Attention only averages values, so that any invertible T (r, r) may stand between V_g and O_h: r² numbers of each group are
free, and chosen to make r columns of V_g the identity. At r = head_dim nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_core.layers.base import CompressedModule, Entry, PivotIndex, parameter_like
from lowrank_core.layers.pivoting import GaugedHeads, gather_order
from lowrank_core.layers.quantized import Factor, applied, dense_of

__all__ = ["OutputHeads", "ValueHeads"]


class ValueHeads(PivotIndex):
    """Maps x (..., n) to (..., groups · head_dim): of each group r values, then zeros.

    Of each group's (r, n) matrix, r columns (``pivots``, int32) are the identity, the others are ``rest`` (groups, r, n − r).
    The zeros let attention code with its fixed head_dim run unchanged; the value cache is not smaller for it.
    """

    form: ClassVar[str] = "value_heads"
    factors: ClassVar[tuple[str, ...]] = ("rest",)
    rest: Factor
    biases: nn.Parameter | None

    def __init__(self, in_features: int, groups: int, head_dim: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, groups * head_dim, rank
        self.groups, self.head_dim = groups, head_dim
        self.rest = nn.Parameter(torch.empty(groups, rank, in_features - rank))
        self.register_parameter("biases", nn.Parameter(torch.empty(groups, rank)) if bias else None)
        self._register_pivots(groups, rank, size=in_features)

    @classmethod
    def from_gauged(cls, heads: GaugedHeads, head_dim: int, *, like: Tensor) -> ValueHeads:
        """Return the module in the dtype and on the device of ``like``."""
        groups, rank, others = heads.rest.shape
        with torch.device("meta"):
            module = cls(others + rank, groups, head_dim, rank, bias=heads.biases is not None)
        module.rest = parameter_like(heads.rest, like)
        module.biases = None if heads.biases is None else parameter_like(heads.biases, like)
        module._set_pivots(heads.pivots, like.device)
        return module

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> ValueHeads:
        groups, head_dim = _heads(entry, "groups", shape[0])
        rank = entry.integer("rank", 1, min(head_dim, shape[1]))
        return cls(shape[1], groups, head_dim, rank, bias=entry.flag("bias"))._as_told(entry)

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        shape = {"groups": self.groups, "head_dim": self.head_dim}
        return {"form": self.form, "rank": self.rank, "bias": self.biases is not None, **shape, **self._grid_entry()}

    @property
    def weight(self) -> Tensor:
        matrix = self._matrix(gather_order(self.pivots, self.in_features))  # the cached order may not be loaded yet
        return functional.pad(matrix, (0, 0, 0, self.head_dim - self.rank)).flatten(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """The (out_features,) bias that the module stands for, made again each time; ``biases`` (groups, r) are stored."""
        return None if self.biases is None else functional.pad(self.biases, (0, self.head_dim - self.rank)).flatten()

    @property
    def reducing_matrix(self) -> Tensor:
        """The (groups · r, n) matrix of all groups, without the zeros."""
        return self._matrix(self.order).flatten(0, 1)

    def _matrix(self, order: Tensor) -> Tensor:
        """Return (groups, r, n)."""
        rest = dense_of(self.rest)
        eye = torch.eye(self.rank, dtype=rest.dtype, device=rest.device).expand(self.groups, -1, -1)
        return torch.cat([eye, rest], dim=-1).gather(-1, order[:, None, :].expand(-1, self.rank, -1))

    def forward(self, input: Tensor) -> Tensor:
        biases = None if self.biases is None else self.biases.flatten()
        values = functional.linear(input, self.reducing_matrix, biases)
        return functional.pad(values.reshape(*input.shape[:-1], self.groups, self.rank), (0, self.head_dim - self.rank)).flatten(-2)

    def extra_repr(self) -> str:
        bias = self.biases is not None
        return f"in_features={self.in_features}, groups={self.groups}, head_dim={self.head_dim}, rank={self.rank}, bias={bias}"


class OutputHeads(CompressedModule):
    """Maps (..., heads · head_dim) to (..., d): reads the first r dimensions of each head by ``outputs`` (d, heads · r)."""

    form: ClassVar[str] = "output_heads"
    factors: ClassVar[tuple[str, ...]] = ("outputs",)
    outputs: Factor
    bias: nn.Parameter | None

    def __init__(self, out_features: int, heads: int, head_dim: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = heads * head_dim, out_features, rank
        self.heads, self.head_dim = heads, head_dim
        self.outputs = nn.Parameter(torch.empty(out_features, heads * rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def from_outputs(cls, outputs: Tensor, bias: Tensor | None, head_dim: int, *, like: Tensor) -> OutputHeads:
        """Return the module of ``outputs`` (heads, d, r) in the dtype and on the device of ``like``."""
        heads, out_features, rank = outputs.shape
        with torch.device("meta"):
            module = cls(out_features, heads, head_dim, rank, bias=bias is not None)
        module.outputs = parameter_like(outputs.transpose(0, 1).flatten(1), like)
        module.bias = None if bias is None else parameter_like(bias, like)
        return module

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> OutputHeads:
        heads, head_dim = _heads(entry, "heads", shape[1])
        return cls(shape[0], heads, head_dim, entry.integer("rank", 1, head_dim), bias=entry.flag("bias"))._as_told(entry)

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        shape = {"heads": self.heads, "head_dim": self.head_dim}
        return {"form": self.form, "rank": self.rank, "bias": self.bias is not None, **shape, **self._grid_entry()}

    @property
    def weight(self) -> Tensor:
        per_head = dense_of(self.outputs).reshape(self.out_features, self.heads, self.rank)
        return functional.pad(per_head, (0, self.head_dim - self.rank)).flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        return applied(self.outputs, self.reduced(input), self.bias)

    def reduced(self, input: Tensor) -> Tensor:
        """Return (..., heads · r): what the heads carry."""
        return input.reshape(*input.shape[:-1], self.heads, self.head_dim)[..., : self.rank].flatten(-2)

    def expanded(self, reduced: Tensor) -> Tensor:
        """Return (..., d) from ``reduced``, without the bias."""
        return applied(self.outputs, reduced)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"heads={self.heads}, head_dim={self.head_dim}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


def _heads(entry: Entry, key: str, width: int) -> tuple[int, int]:
    count, head_dim = entry.integer(key, 1, width), entry.integer("head_dim", 1, width)
    if count * head_dim != width:
        entry.refuse(f"{key} and head_dim", f"{count} times {head_dim}; the layer is {width} wide")
    return count, head_dim

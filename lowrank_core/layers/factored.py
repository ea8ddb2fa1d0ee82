"""The layer that stands where a linear layer stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_core.layers.base import CompressedModule, Entry, parameter_like
from lowrank_core.layers.quantized import Factor, applied, dense_of
from lowrank_core.layers.stacked import StackedLinear

__all__ = ["LowRankLinear"]


class LowRankLinear(StackedLinear):
    """y = up (down x) + bias, with ``down`` (rank, in_features) and ``up`` (out_features, rank).

    It behaves as ``nn.Linear`` does: device moves, dtype casts, state_dict, autograd, any leading batch shape.
    In a stack, followers have no ``down``: they read that of their leader.
    """

    form: ClassVar[str] = "factored"
    factors: ClassVar[tuple[str, ...]] = ("down", "up")
    up: Factor

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, leader: LowRankLinear | None = None) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, leader=leader)
        self.up = nn.Parameter(torch.empty(out_features, rank))

    @classmethod
    def from_factors(
        cls, up: Tensor, down: Tensor, bias: Tensor | None, *, like: Tensor, leader: LowRankLinear | None = None
    ) -> LowRankLinear:
        """Return a layer that holds the factors in the dtype and on the device of ``like``; with a leader, ``down`` is the leader's."""
        with torch.device("meta"):
            layer = cls(down.shape[1], up.shape[0], down.shape[0], bias=bias is not None, leader=leader)
        layer.up = parameter_like(up, like)
        layer.down = parameter_like(down, like) if leader is None else None
        layer.bias = None if bias is None else parameter_like(bias, like)
        return layer

    @classmethod
    def stack(cls, ups: Sequence[Tensor], down: Tensor, biases: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[LowRankLinear]:
        """Return the members of a stack, the leader first; ``ups`` (m_i, r) share ``down`` (r, n)."""
        layers: list[LowRankLinear] = []
        for up, bias, like in zip(ups, biases, likes, strict=True):
            layers.append(cls.from_factors(up, down, bias, like=like, leader=layers[0] if layers else None))
        return layers

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> LowRankLinear:
        rank = cls._rank_of(entry, shape, leader)
        layer = cls(shape[1], shape[0], rank, bias=entry.flag("bias"), leader=cast(LowRankLinear | None, leader))
        return layer._as_told(entry)

    @property
    def weight(self) -> Tensor:
        return dense_of(self.up) @ self.shared_down

    def forward(self, input: Tensor) -> Tensor:
        return applied(self.up, self.reduced(input), self.bias)

    def expanded(self, reduced: Tensor) -> Tensor:
        return applied(self.up, reduced)

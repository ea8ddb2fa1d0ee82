"""Pivoted low-rank layer (PIFA, arXiv 2501.19090): same matrix, r(m+n-r) parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_core.layers.base import CompressedModule, Entry, PivotIndex, parameter_like
from lowrank_core.layers.pivoting import PivotedFactors, gather_order
from lowrank_core.layers.quantized import Factor, applied, dense_of
from lowrank_core.layers.stacked import StackedLinear

__all__ = ["PivotedLinear"]


class PivotedLinear(StackedLinear, PivotIndex):
    """Some rows of the matrix, and the others as combinations of them: y[pivots] = (down x)[own], y[rest] = coefficients (down x).

    ``down`` (rank, in_features) holds the pivot rows of a whole stack, each member's in a slice that begins at ``offset``.
    A member stores ``coefficients`` (out_features − own, rank) and the int32 row numbers ``pivots`` (own,), and its bias.
    It behaves as ``nn.Linear`` does; a follower has no ``down`` and reads its leader's.
    """

    form: ClassVar[str] = "pivoted"
    factors: ClassVar[tuple[str, ...]] = ("down", "coefficients")
    coefficients: Factor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        own: int | None = None,
        offset: int = 0,
        leader: PivotedLinear | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, leader=leader)
        self.own = rank if own is None else own
        self.offset = offset
        self.coefficients = nn.Parameter(torch.empty(out_features - self.own, rank))
        self._register_pivots(self.own, size=out_features)

    @classmethod
    def stack(cls, factors: PivotedFactors, biases: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[PivotedLinear]:
        """Return the members of a stack, the leader first, in the dtypes and on the devices of ``likes``."""
        rank, in_features = factors.rows.shape
        layers: list[PivotedLinear] = []
        for member, (coefficients, pivots) in enumerate(zip(factors.coefficients, factors.pivots, strict=True)):
            own, bias, like = len(pivots), biases[member], likes[member]
            out_features, offset, leader = len(coefficients) + own, factors.offsets[member], layers[0] if layers else None
            with torch.device("meta"):
                layer = cls(in_features, out_features, rank, bias=bias is not None, own=own, offset=offset, leader=leader)
            layer.down = parameter_like(factors.rows, like) if leader is None else None
            layer.coefficients = parameter_like(coefficients, like)
            layer.bias = None if bias is None else parameter_like(bias, like)
            layer._set_pivots(pivots, like.device)
            layers.append(layer)
        return layers

    @classmethod
    def from_spec(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> PivotedLinear:
        rank = cls._rank_of(entry, shape, leader)
        own = entry.integer("own", 0, min(rank, shape[0]))
        offset = entry.integer("offset", 0, rank - own)
        known = cast(PivotedLinear | None, leader)
        return cls(shape[1], shape[0], rank, bias=entry.flag("bias"), own=own, offset=offset, leader=known)._as_told(entry)

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        return super().spec(names) | {"own": self.own, "offset": self.offset}

    @property
    def largest_coefficient(self) -> float:
        """max |coefficient|: by how much rounding of the pivot rows can grow."""
        coefficients = dense_of(self.coefficients).detach()
        return float(coefficients.abs().max()) if coefficients.numel() else 0.0

    @property
    def weight(self) -> Tensor:
        rows = self.shared_down[self.offset : self.offset + self.own]
        order = gather_order(self.pivots, self.out_features)  # the cached one may not be loaded yet
        return torch.cat([rows, dense_of(self.coefficients) @ self.shared_down]).index_select(0, order)

    def forward(self, input: Tensor) -> Tensor:
        outputs = self.expanded(self.reduced(input))
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def expanded(self, reduced: Tensor) -> Tensor:
        own = reduced[..., self.offset : self.offset + self.own]
        parts = torch.cat([own, applied(self.coefficients, reduced)], dim=-1)
        # In two dimensions: along the last of three, index_select is several times slower on a CPU.
        return parts.reshape(-1, self.out_features).index_select(1, self.order).view(parts.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, own={self.own}, offset={self.offset}"

"""The layer that stands where a linear layer stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    """y = up (down x) + bias, with ``down`` (rank, in_features) and ``up`` (out_features, rank).

    It behaves as ``nn.Linear`` does: device moves, dtype casts, state_dict, autograd, any leading batch shape.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def from_factors(cls, up: Tensor, down: Tensor, bias: Tensor | None, *, like: Tensor) -> LowRankLinear:
        """Return a layer that holds the factors in the dtype and on the device of ``like``."""
        with torch.device("meta"):
            layer = cls(down.shape[1], up.shape[0], down.shape[0], bias=bias is not None)
        for name, value in (("up", up), ("down", down), ("bias", bias)):
            if value is not None:
                parameter = nn.Parameter(value.to(device=like.device, dtype=like.dtype).contiguous(), requires_grad=like.requires_grad)
                setattr(layer, name, parameter)
        return layer

    @property
    def weight(self) -> Tensor:
        """The (out_features, in_features) matrix that the factors stand for; made anew each time, so changing it changes nothing.

        transformers reads (and, before weights are loaded, initialises) ``weight`` of layers that it knows by name.
        """
        return self.up @ self.down

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(functional.linear(input, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"

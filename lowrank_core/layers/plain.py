"""Two linear layers in place of one, in an architecture of transformers whose config names such layers.

A folder of the plain form carries this file, for runtimes without lowrank-studio: it imports torch alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PlainFactors", "WithFactors"]


class PlainFactors(nn.Module):
    """y = up (down x) + bias. The empty ``weight`` makes a loader that expects the dense matrix under this name refuse the file."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        outputs: Tensor = self.up(self.down(input))
        return outputs


class WithFactors(nn.Module):
    """Mixed into an architecture: layers in ``config.lowrank_ranks`` become factors, those in ``config.lowrank_biases`` have a bias."""

    base_model_prefix: str

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        whole = hasattr(self, self.base_model_prefix)  # else this is the base model: names begin with what is inside it
        for name in dict.fromkeys([*config.lowrank_ranks, *config.lowrank_biases]):
            parent, _, leaf = (name if whole else name.removeprefix(f"{self.base_model_prefix}.")).rpartition(".")
            owner = self.get_submodule(parent)
            dense = getattr(owner, leaf)
            d_in, d_out = (dense.in_features, dense.out_features) if isinstance(dense, nn.Linear) else (dense.nx, dense.nf)  # Conv1D
            bias, rank = name in config.lowrank_biases, config.lowrank_ranks.get(name)
            setattr(owner, leaf, nn.Linear(d_in, d_out, bias) if rank is None else PlainFactors(d_in, d_out, rank, bias=bias))

"""The paper's post-training (arXiv 2405.10616): diagonals next to the frozen factors, folded into them in the end.

Notation: W ~ B A with B (m, r), A (r, n); Λ_b (m,), Λ_d (r,) diagonals. y = (B A + Λ_b B Λ_d A) x = (B ∘ (1 + Λ_b Λ_dᵀ)) A x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import ConfigError
from lowrank_core.healing.base import Healer, Student, compressed_layers
from lowrank_core.layers.factored import LowRankLinear
from lowrank_core.layers.heads import OutputHeads
from lowrank_core.layers.pivoted import PivotedLinear
from lowrank_core.layers.pivoting import pivot
from lowrank_core.layers.stacked import StackedLinear
from lowrank_core.models.unrolled import replace_module

__all__ = ["DiagonalAdapter", "DiagonalPostTraining"]

Adapted = LowRankLinear | PivotedLinear | OutputHeads


class DiagonalAdapter(nn.Module):
    """A compressed layer with the diagonals ``rows`` Λ_b, from 0, and ``dimensions`` Λ_d, from 1: at first it changes nothing."""

    def __init__(self, inner: Adapted) -> None:
        super().__init__()
        self.inner = inner
        dimensions = inner.heads * inner.rank if isinstance(inner, OutputHeads) else inner.rank
        like = next(inner.parameters())
        self.rows = nn.Parameter(torch.zeros(inner.out_features, dtype=like.dtype, device=like.device))
        self.dimensions = nn.Parameter(torch.ones(dimensions, dtype=like.dtype, device=like.device))

    @property
    def weight(self) -> Tensor:
        """The matrix without the diagonals, which transformers may ask a layer for."""
        return self.inner.weight

    def forward(self, input: Tensor) -> Tensor:
        reduced = self.inner.reduced(input)
        outputs = self.inner.expanded(reduced) + self.rows * self.inner.expanded(self.dimensions * reduced)
        return outputs if self.inner.bias is None else outputs + self.inner.bias

    def folded_up(self) -> Tensor:
        """Return B ∘ (1 + Λ_b Λ_dᵀ), (m, r), in float64."""
        eye = torch.eye(len(self.dimensions), dtype=self.rows.dtype, device=self.rows.device)
        up = self.inner.expanded(eye).T.double()
        return up * (1 + torch.outer(self.rows.double(), self.dimensions.double()))


class DiagonalPostTraining(Healer):
    """Two diagonals for each layer are trained, m + r numbers instead of r(m + n); values of per-head factors have none."""

    name: ClassVar[str] = "diagonal"
    reference: ClassVar[str] = "arXiv 2405.10616"

    def student(self, module: PreTrainedModel, config: HealingConfig) -> Student:
        layers = {name: layer for name, layer in compressed_layers(module).items() if isinstance(layer, Adapted)}
        if not layers:
            raise ConfigError("no layer of this model can carry diagonals. Heal it by distill.")
        adapters = {name: DiagonalAdapter(layer) for name, layer in layers.items()}
        trained: dict[str, nn.Parameter] = {}
        for name, adapter in adapters.items():
            replace_module(module, name, adapter)
            trained |= {f"{name}.rows": adapter.rows, f"{name}.dimensions": adapter.dimensions}
        return Student(module, trained, lambda: _folded(module, adapters))


@torch.no_grad()
def _folded(module: PreTrainedModel, adapters: Mapping[str, DiagonalAdapter]) -> PreTrainedModel:
    stacks: dict[StackedLinear, list[str]] = {}
    for name, adapter in adapters.items():
        inner, up = adapter.inner, adapter.folded_up()
        replace_module(module, name, inner)
        if isinstance(inner, PivotedLinear):
            stacks.setdefault(inner.leader, []).append(name)
            continue
        factor = inner.outputs if isinstance(inner, OutputHeads) else inner.up
        assert isinstance(factor, nn.Parameter)
        factor.copy_(up)
    for leader, names in stacks.items():
        names.sort(key=lambda name: adapters[name].inner is not leader)  # the leader first
        _pivoted_again(module, {name: adapters[name] for name in names})
    return module


def _pivoted_again(module: PreTrainedModel, adapters: Mapping[str, DiagonalAdapter]) -> None:
    """Store a stack again: the identity among the rows of B is gone, and other rows may be better pivots. Its size is the same."""
    layers = [adapter.inner for adapter in adapters.values()]
    leader = layers[0]
    assert isinstance(leader, PivotedLinear)
    factors = pivot([adapter.folded_up().cpu() for adapter in adapters.values()], leader.shared_down.double().cpu(), next(iter(adapters)))
    biases = [layer.bias for layer in layers]
    likes = [next(layer.parameters()) for layer in layers]
    for name, layer in zip(adapters, PivotedLinear.stack(factors, biases, likes), strict=True):
        replace_module(module, name, layer)

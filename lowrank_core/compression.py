"""From bases and an allocation to a smaller model, with its exact counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lowrank_core.accounting import compression_ratio
from lowrank_core.allocation import RankAllocation
from lowrank_core.bases import FactorBasis
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.models.handle import ModelHandle, weight_of
from lowrank_core.models.hf import replace_module
from lowrank_core.models.lowrank_linear import LowRankLinear

__all__ = ["CompressedModel", "CompressionReport", "compress", "low_rank_layers", "swapped"]


@dataclass(frozen=True)
class CompressionReport:
    """Exact counts, before and after; ``compression_ratio`` over the compressible linears, ``model_…`` over all."""

    parameters_before: int
    parameters_after: int
    linear_parameters_before: int
    linear_parameters_after: int
    bytes_before: int
    bytes_after: int
    ranks: Mapping[str, int | None]

    @property
    def compression_ratio(self) -> float:
        return compression_ratio(self.linear_parameters_before, self.linear_parameters_after)

    @property
    def model_compression_ratio(self) -> float:
        return compression_ratio(self.parameters_before, self.parameters_after)


@dataclass(frozen=True)
class CompressedModel:
    """The smaller model and what was counted in it."""

    handle: ModelHandle
    report: CompressionReport


def low_rank_layers(handle: ModelHandle, bases: Mapping[str, FactorBasis], ranks: Mapping[str, int | None]) -> dict[str, LowRankLinear]:
    """Return the layers that replace the dense ones at ``ranks``; layers that stay dense are left out.

    Raises:
        ConfigError: a rank for a layer without a basis.
        RankError: a rank outside its limits.
        NumericalError: a factor that is not finite in the model's dtype; names the layer.
    """
    layers = {}
    for name, rank in ranks.items():
        if rank is None:
            continue
        if name not in bases:
            raise ConfigError(f"ranks: {name!r} is no compressible layer of this model.")
        factors = bases[name].slice(rank)
        like = weight_of(handle.module.get_submodule(name))
        layer = LowRankLinear.from_factors(factors.up, factors.down, factors.bias, like=like)
        if not all(torch.isfinite(p).all() for p in layer.parameters()):
            raise NumericalError(f"{name}: its factors overflow in {like.dtype}. Load the model in float32 or bfloat16.")
        layers[name] = layer
    return layers


@contextmanager
def swapped(handle: ModelHandle, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put ``layers`` in place for a while: a search trial without a copy of the model. The dense ones always come back."""
    dense = {name: handle.module.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(handle.module, name, layer)
        yield
    finally:
        for name, layer in dense.items():
            replace_module(handle.module, name, layer)


def compress(handle: ModelHandle, bases: Mapping[str, FactorBasis], allocation: RankAllocation) -> CompressedModel:
    """Return a new model with the layers of ``allocation`` replaced; the given one is not touched.

    Raises:
        ConfigError, RankError, NumericalError: as ``low_rank_layers``.
    """
    layers = low_rank_layers(handle, bases, allocation.ranks)
    # deepcopy takes a replaced layer from its memo, so that no dense weight is copied to be thrown away.
    memo: dict[int, object] = {id(handle.module.get_submodule(name)): layer for name, layer in layers.items()}
    module = copy.deepcopy(handle.module, memo)
    rest = tuple(layer for layer in handle.layers if allocation.ranks.get(layer.name) is None)
    smaller = ModelHandle(handle.reference, module, handle.tokenizer, rest, handle.stored_dtype)
    report = CompressionReport(
        parameters_before=handle.parameters,
        parameters_after=smaller.parameters,
        linear_parameters_before=handle.linear_parameters,
        linear_parameters_after=smaller.linear_parameters,
        bytes_before=handle.bytes,
        bytes_after=smaller.bytes,
        ranks={layer.name: allocation.ranks.get(layer.name) for layer in handle.layers},
    )
    return CompressedModel(smaller, report)

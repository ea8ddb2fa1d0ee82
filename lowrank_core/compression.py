"""From bases and an allocation to a smaller model, with its exact counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lowrank_core.accounting import compression_ratio
from lowrank_core.allocation import RankAllocation, Ranks
from lowrank_core.decomposition import Bases
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.models.handle import ModelHandle, weight_of
from lowrank_core.models.hf import replace_module
from lowrank_core.models.storage import build_layers

__all__ = ["CompressedModel", "CompressionReport", "assembled", "compress", "low_rank_layers", "swapped"]


@dataclass(frozen=True)
class CompressionReport:
    """Exact counts, before and after; ``compression_ratio`` over the compressible linears, ``model_…`` over all."""

    parameters_before: int
    parameters_after: int
    linear_parameters_before: int
    linear_parameters_after: int
    bytes_before: int
    bytes_after: int
    ranks: Ranks

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


def low_rank_layers(handle: ModelHandle, bases: Bases, ranks: Ranks, *, storage: str | None = None) -> dict[str, nn.Module]:
    """Return the layers that replace the dense ones at ``ranks``; layers that stay dense are left out.

    Args:
        storage: stored so instead of as the units say: a search measures plain factors, the same function up to rounding.

    Raises:
        ConfigError: a rank for a unit without a basis.
        RankError: a rank outside its limits.
        NumericalError: a factor that is not finite in the model's dtype; names the layer.
    """
    layers: dict[str, nn.Module] = {}
    for name, rank in ranks.items():
        if rank is None:
            continue
        if name not in bases:
            raise ConfigError(f"ranks: {name!r} is no compressible layer of this model.")
        unit = bases[name].unit
        members = [member.name for member in unit.members]
        likes = [weight_of(handle.module.get_submodule(member)) for member in members]
        built = build_layers(members, bases[name].slice(rank), storage or unit.storage, likes)
        if not all(torch.isfinite(p).all() for layer in built.values() for p in layer.parameters()):
            raise NumericalError(f"{name}: its factors overflow in {likes[0].dtype}. Load the model in float32 or bfloat16.")
        layers |= built
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


def compress(handle: ModelHandle, bases: Bases, allocation: RankAllocation) -> CompressedModel:
    """Return a new model with the layers of ``allocation`` replaced; the given one is not touched.

    Raises:
        ConfigError, RankError, NumericalError: as ``low_rank_layers``.
    """
    return assembled(handle, low_rank_layers(handle, bases, allocation.ranks), allocation.ranks)


def assembled(handle: ModelHandle, layers: Mapping[str, nn.Module], ranks: Ranks) -> CompressedModel:
    """Return a copy of the model with ``layers`` in place, and its counts; ``ranks`` are by unit."""
    # deepcopy takes a replaced layer from its memo, so that no dense weight is copied to be thrown away.
    memo: dict[int, object] = {id(handle.module.get_submodule(name)): layer for name, layer in layers.items()}
    module = copy.deepcopy(handle.module, memo)
    rest = tuple(layer for layer in handle.layers if layer.name not in layers)
    smaller = ModelHandle(handle.reference, module, handle.tokenizer, rest, handle.stored_dtype)
    report = CompressionReport(
        parameters_before=handle.parameters,
        parameters_after=smaller.parameters,
        linear_parameters_before=handle.linear_parameters,
        linear_parameters_after=smaller.linear_parameters,
        bytes_before=handle.bytes,
        bytes_after=smaller.bytes,
        ranks=dict(ranks),
    )
    return CompressedModel(smaller, report)

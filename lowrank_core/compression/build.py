"""Construction of the compressed model from factors and an allocation, with exact counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from lowrank_core.allocation import RankAllocation, Ranks
from lowrank_core.coverage import Coverage
from lowrank_core.decomposition.units import AnyBasis, Bases
from lowrank_core.errors import ConfigError
from lowrank_core.layers.forms import build_layers
from lowrank_core.layers.pivoted import PivotedLinear
from lowrank_core.models.handle import ModelHandle, head_flops, weight_of
from lowrank_core.models.unrolled import replace_module
from lowrank_core.parameters import compression_ratio

__all__ = ["CompressedModel", "CompressionReport", "UnitCount", "build_model", "compress", "low_rank_layers", "swap_layers"]


@dataclass(frozen=True)
class UnitCount:
    """Cost and conditioning of a compressed unit.

    Attributes:
        name, rank, storage: of the unit.
        parameters, dense_parameters: biases and indices included.
        bytes, dense_bytes: at the checkpoint's stored dtype.
        flops_per_token, dense_flops_per_token: multiply-adds as two operations.
        damping: δ that was added to the input's metric; condition: of that metric before, None where it is singular.
        largest_coefficient: max |C| of pivoted storage, by how much rounding can grow; None for other storages.
    """

    name: str
    rank: int
    storage: str
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    flops_per_token: int
    dense_flops_per_token: int
    damping: float
    condition: float | None
    largest_coefficient: float | None


@dataclass(frozen=True)
class CompressionReport:
    """Exact counts, before and after; ``compression_ratio`` over the compressible linears, ``model_…`` over all.

    FLOPs are those of weights for one token: ``linear_…`` of the compressible linears, ``model_…`` with the output head. Attention
    scores, which grow with the context, are in neither. ``quantization`` sums up ``grids``: unit, or layer that stays dense -> the grid
    that it is rounded to; both are empty where all are floats. ``coverage`` says what the
    dense model is made of, kind -> parameters (``lowrank_core.coverage``), ``dense`` which model that was (``ModelHandle.identity``); both
    are empty in a record of an earlier version.
    """

    parameters_before: int
    parameters_after: int
    linear_parameters_before: int
    linear_parameters_after: int
    bytes_before: int
    bytes_after: int
    linear_flops_before: int
    linear_flops_after: int
    model_flops_before: int
    model_flops_after: int
    ranks: Ranks
    units: tuple[UnitCount, ...]
    quantization: str = ""
    grids: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, int] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def dense_coverage(self) -> Coverage:
        """Coverage of the dense model."""
        return (
            Coverage.of(self.coverage.items())
            if self.coverage
            else Coverage.unrecorded(self.linear_parameters_before, self.parameters_before)
        )

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
        for layer in built.values():
            handle.settle(layer)
        layers |= built
    return layers


@contextmanager
def swap_layers(handle: ModelHandle, layers: Mapping[str, nn.Module]) -> Iterator[None]:
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
    return build_model(handle, low_rank_layers(handle, bases, allocation.ranks), bases, allocation.ranks)


def build_model(handle: ModelHandle, layers: Mapping[str, nn.Module], bases: Bases, ranks: Ranks) -> CompressedModel:
    """Return a copy of the model with ``layers`` in place, and its counts; ``ranks`` are by unit."""
    # deepcopy takes a replaced layer from its memo, so that no dense weight is copied to be thrown away.
    memo: dict[int, object] = {id(handle.module.get_submodule(name)): layer for name, layer in layers.items()}
    module = copy.deepcopy(handle.module, memo)
    rest = tuple(layer for layer in handle.layers if layer.name not in layers)
    smaller = ModelHandle(handle.reference, module, handle.tokenizer, rest, handle.stored_dtype, weights=handle.weights)
    units = tuple(_counted(bases[name], rank, layers, handle.stored_dtype.itemsize) for name, rank in ranks.items() if rank is not None)
    flops, head = round(sum(shape.flops_per_token for shape in handle.shapes)), head_flops(handle)
    after = flops + sum(unit.flops_per_token - unit.dense_flops_per_token for unit in units)
    report = CompressionReport(
        parameters_before=handle.parameters,
        parameters_after=smaller.parameters,
        linear_parameters_before=handle.linear_parameters,
        linear_parameters_after=smaller.linear_parameters,
        bytes_before=handle.bytes,
        bytes_after=smaller.bytes,
        linear_flops_before=flops,
        linear_flops_after=after,
        model_flops_before=flops + head,
        model_flops_after=after + head,
        ranks=dict(ranks),
        units=units,
        coverage=dict(handle.coverage.parameters),
        dense=handle.identity,
    )
    return CompressedModel(smaller, report)


def _counted(basis: AnyBasis, rank: int, layers: Mapping[str, nn.Module], itemsize: int) -> UnitCount:
    unit = basis.unit
    built = [layers[member.name] for member in unit.members]
    coefficients = [layer.largest_coefficient for layer in built if isinstance(layer, PivotedLinear)]
    return UnitCount(
        name=unit.name,
        rank=rank,
        storage=unit.storage,
        parameters=unit.parameters(rank),
        dense_parameters=unit.dense_parameters,
        bytes=unit.bytes(rank, itemsize),
        dense_bytes=unit.bytes(None, itemsize),
        flops_per_token=unit.flops_per_token(rank),
        dense_flops_per_token=unit.flops_per_token(None),
        damping=basis.damping,
        condition=basis.condition if math.isfinite(basis.condition) else None,
        largest_coefficient=max(coefficients) if coefficients else None,
    )

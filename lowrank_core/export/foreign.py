"""Counts of a model that another project compressed, from the model that was loaded, so that it is exported as ours are."""

from __future__ import annotations

from lowrank_core.compression.build import CompressedModel, CompressionReport, UnitCount
from lowrank_core.files.foreign import ForeignFolder
from lowrank_core.layers.factored import LowRankLinear
from lowrank_core.models.foreign import dense_skeleton
from lowrank_core.models.handle import ModelHandle, head_flops
from lowrank_core.models.hf import compressed_modules

__all__ = ["counted"]


def counted(handle: ModelHandle, foreign: ForeignFolder) -> CompressedModel:
    """Return a loaded model of another project's folder with its counts; what the dense model had follows from its shapes."""
    layers = {name: child for name, child in compressed_modules(handle.module) if isinstance(child, LowRankLinear)}
    units = tuple(_counted(name, child, handle.stored_dtype.itemsize) for name, child in layers.items())
    before, flops = sum(parameter.numel() for parameter in dense_skeleton(foreign).parameters()), sum(u.flops_per_token for u in units)
    dense_flops, others = sum(u.dense_flops_per_token for u in units), round(sum(shape.flops_per_token for shape in handle.shapes))
    head = 0 if handle.module.get_output_embeddings() in layers.values() else head_flops(handle)
    report = CompressionReport(
        parameters_before=before,
        parameters_after=handle.parameters,
        linear_parameters_before=handle.linear_parameters + sum(u.dense_parameters - u.parameters for u in units),
        linear_parameters_after=handle.linear_parameters,
        bytes_before=before * handle.stored_dtype.itemsize,
        bytes_after=handle.bytes,
        linear_flops_before=others + dense_flops,
        linear_flops_after=others + flops,
        model_flops_before=others + dense_flops + head,
        model_flops_after=others + flops + head,
        ranks={unit.name: unit.rank for unit in units},
        units=units,
    )
    return CompressedModel(handle, report)


def _counted(name: str, child: LowRankLinear, itemsize: int) -> UnitCount:
    d_out, d_in, rank = child.out_features, child.in_features, child.rank
    weights, dense, bias = rank * (d_out + d_in), d_out * d_in, 0 if child.bias is None else d_out
    return UnitCount(
        name=name,
        rank=rank,
        storage=child.form,
        parameters=weights + bias,
        dense_parameters=dense + bias,
        bytes=(weights + bias) * itemsize,
        dense_bytes=(dense + bias) * itemsize,
        flops_per_token=2 * weights,
        dense_flops_per_token=2 * dense,
        damping=0.0,
        condition=None,
        largest_coefficient=None,
    )

"""A compressed model with its factors in 8 bits: the same ranks, a quarter to half of the bytes.

Each row of a factor becomes whole numbers from -127 to 127 times one scale. Biases and what stayed dense are as they were.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from lowrank_core.compression.build import CompressedModel, CompressionReport
from lowrank_core.errors import ConfigError
from lowrank_core.layers.base import CompressedModule, PivotIndex
from lowrank_core.layers.quantized import Int8Matrix
from lowrank_core.models.handle import ModelHandle

__all__ = ["quantized", "quantized_handle"]


def quantized_handle(handle: ModelHandle, *, scales: torch.dtype | None = None) -> ModelHandle:
    """Return a copy of a compressed model with its factors in 8 bits; what is measured on it is measured with them.

    Args:
        scales: dtype that holds the scales exactly, the one that they will be written in; that of the checkpoint unless it is given.

    Raises:
        ConfigError: the model has no factors, or they are in 8 bits already.
    """
    layers = [child for child in handle.module.modules() if isinstance(child, CompressedModule)]
    if not layers:
        raise ConfigError("int8 is for the factors of compressed layers, and this model has none. Compress it first.")
    if any(layer.int8 for layer in layers):
        raise ConfigError("the factors of this model are in 8 bits already. Start from the model that they were made of.")
    module = copy.deepcopy(handle.module)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, CompressedModule):
                child.quantize(scales or handle.stored_dtype)
    return replace(handle, module=module)


def quantized(model: CompressedModel, *, scales: torch.dtype | None = None) -> CompressedModel:
    """As ``quantized_handle``, with the counts of the report: scales are counted as parameters, factors as one byte each.

    Raises:
        ConfigError: as ``quantized_handle``.
    """
    handle = quantized_handle(model.handle, scales=scales)
    report: CompressionReport = replace(
        model.report,
        parameters_after=handle.parameters,
        linear_parameters_after=handle.linear_parameters,
        bytes_after=handle.bytes,
        quantization="int8",
        units=tuple(
            replace(unit, bytes=sum(stored_bytes(handle.module.get_submodule(name), handle.stored_dtype) for name in unit.name.split("+")))
            for unit in model.report.units
        ),
    )
    return CompressedModel(handle, report)


def stored_bytes(module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of one layer on disk: floats in ``dtype``, int8 values and int32 indices as they are."""
    floats = sum(parameter.numel() for parameter in module.parameters())
    small = [child for child in module.modules() if isinstance(child, Int8Matrix)]
    floats += sum(child.scales.numel() for child in small)
    indices = module.pivots.numel() * module.pivots.element_size() if isinstance(module, PivotIndex) else 0
    return floats * dtype.itemsize + sum(child.values.numel() for child in small) + indices

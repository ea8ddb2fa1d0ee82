"""A compressed model whose matrices are rounded to grids of 8 or 4 bits: the same ranks, a quarter to an eighth of the bytes.

Which grid each layer has is the caller's choice (``factor_grids``). Biases, embeddings, the head and norms are as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch

from lowrank_core.compression.build import CompressedModel
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.layers.base import CompressedModule, PivotIndex
from lowrank_core.layers.grids import Grid
from lowrank_core.layers.quantized import QuantizedMatrix
from lowrank_core.models.handle import ModelHandle

__all__ = ["factor_grids", "quantized", "quantized_handle", "stored_bytes"]

Grids = Mapping[str, Grid]
"""Dotted path of a layer -> the grid that its matrices are rounded to."""


def factor_grids(handle: ModelHandle, grid: Grid) -> dict[str, Grid]:
    """Return ``grid`` for every layer that has factors.

    Raises:
        ConfigError: the model has none, or they are quantised already.
    """
    layers = {name: child for name, child in handle.module.named_modules() if isinstance(child, CompressedModule)}
    if not layers:
        raise ConfigError(f"{grid.name} is for the factors of compressed layers, and this model has none. Compress it first.")
    if any(layer.grid is not None for layer in layers.values()):
        raise ConfigError("this model is quantised already. Start from the model that it was made of.")
    return dict.fromkeys(layers, grid)


def quantized_handle(handle: ModelHandle, grids: Grids, *, scales: torch.dtype | None = None) -> ModelHandle:
    """Return a copy of a model with the matrices of some layers on grids; what is measured on it is measured with them.

    Args:
        scales: dtype that holds the scales of int8 exactly, the one that they will be written in; that of the checkpoint unless given.

    Raises:
        NumericalError: a matrix holds NaN, Inf or numbers too large for its grid; names the layer.
    """
    module = copy.deepcopy(handle.module)
    with torch.no_grad():
        for name, grid in grids.items():
            layer = module.get_submodule(name)
            assert isinstance(layer, CompressedModule), name
            try:
                layer.quantize(grid, scales or handle.stored_dtype)
            except NumericalError as error:
                raise NumericalError(f"{name}: {error}") from error
    return replace(handle, module=module)


def quantized(model: CompressedModel, grids: Grids, *, scales: torch.dtype | None = None) -> CompressedModel:
    """As ``quantized_handle``, with the counts of the report: scales are counted as parameters, bytes as they are written.

    Raises:
        NumericalError: as ``quantized_handle``.
    """
    handle = quantized_handle(model.handle, grids, scales=scales)
    units = {unit.name: unit.name.split("+") for unit in model.report.units}
    report = replace(
        model.report,
        parameters_after=handle.parameters,
        linear_parameters_after=handle.linear_parameters,
        bytes_after=handle.bytes,
        quantization="+".join(dict.fromkeys(grid.name for grid in grids.values())),
        units=tuple(
            replace(unit, bytes=sum(stored_bytes(handle.module.get_submodule(name), handle.stored_dtype) for name in units[unit.name]))
            for unit in model.report.units
        ),
    )
    return CompressedModel(handle, report)


def stored_bytes(module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of one layer on disk: floats in ``dtype``, quantised matrices and int32 indices as they are."""
    floats = sum(parameter.numel() for parameter in module.parameters())
    matrices = sum(child.bytes(dtype.itemsize) for child in module.modules() if isinstance(child, QuantizedMatrix))
    indices = module.pivots.numel() * module.pivots.element_size() if isinstance(module, PivotIndex) else 0
    return floats * dtype.itemsize + matrices + indices

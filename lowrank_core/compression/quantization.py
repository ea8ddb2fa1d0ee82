"""A model whose matrices are rounded to grids of 8 or 4 bits: factors, and layers that stay dense.

Which grid each layer has is the caller's choice (``grids_of``). Biases, embeddings, the head and norms are as they were.

Notation::

    S        E[x xᵀ] of a layer's inputs in the dense model, as it was calibrated
    A, Â     the factor that reads x, before and after it was rounded;  B the one behind it, or the coefficients of pivoted storage

By GPTQ, B first takes on what the error of A left: B A S Âᵀ (Â S Âᵀ)⁻¹, the least-squares fit; then it is rounded for inputs with the
moment Â S Âᵀ. Per-head factors are rounded to nearest: what their inputs are is not measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.gptq import gptq
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.files.grids import GRIDS, Grid
from lowrank_core.layers.base import CompressedModule, PivotIndex
from lowrank_core.layers.dense import DenseLinear
from lowrank_core.layers.quantized import QuantizedMatrix
from lowrank_core.layers.stacked import StackedLinear
from lowrank_core.models.handle import ModelHandle, bias_of, weight_of
from lowrank_core.models.unrolled import replace_module

__all__ = ["Moments", "grids_of", "quantizable", "quantized", "quantized_handle", "round_layers", "stored_bytes"]

Grids = Mapping[str, Grid]
"""Dotted path of a layer -> the grid that its matrices are rounded to."""

Moments = Callable[[str], Tensor]
"""From the dotted path of a layer to S (n, n), float64."""

_DAMPING = 1e-6
"""Relative to the mean eigenvalue of Â S Âᵀ."""


def grids_of(handle: ModelHandle, factors: str, dense: str) -> dict[str, Grid]:
    """Return the grid of every layer with factors, and of every compressible layer that stays dense; ``none`` leaves them in floats.

    Raises:
        ConfigError: there is nothing to round, or it is rounded already.
    """
    layers = {name: child for name, child in handle.module.named_modules() if isinstance(child, CompressedModule)}
    if any(layer.grid is not None for layer in layers.values()):
        raise ConfigError("this model is quantised already. Start from the model that it was made of.")
    if factors != "none" and not layers and dense == "none":
        raise ConfigError(f"{factors} is for the factors of compressed layers, and this model has none. Compress it first.")
    result = {} if factors == "none" else dict.fromkeys(layers, GRIDS[factors])
    return result if dense == "none" else result | dict.fromkeys((layer.name for layer in handle.layers), GRIDS[dense])


def quantized_handle(
    handle: ModelHandle, grids: Grids, *, scales: torch.dtype | None = None, moments: Moments | None = None
) -> ModelHandle:
    """Return a copy of a model with the matrices of some layers on grids; what is measured on it is measured with them.

    Args:
        scales: dtype that holds the scales of int8 exactly, the one that they will be written in; that of the checkpoint unless given.
        moments: round by GPTQ; to nearest without them.

    Raises:
        NumericalError: a matrix holds NaN, Inf or numbers too large for its grid; names the layer.
    """
    module = copy.deepcopy(handle.module)
    exact = {name: handle.module.get_submodule(name) for name in grids}
    layers = {name: quantizable(module.get_submodule(name)) for name in grids}
    round_layers(layers, exact, grids, scales or handle.stored_dtype, moments)
    for name, layer in layers.items():
        replace_module(module, name, layer)
    return replace(handle, module=module, layers=tuple(layer for layer in handle.layers if layer.name not in grids))


def quantizable(layer: nn.Module) -> CompressedModule:
    """Return a layer with factors as it is, and a dense one as a layer that may be quantised."""
    return layer if isinstance(layer, CompressedModule) else DenseLinear.of(weight_of(layer), bias_of(layer))


@torch.no_grad()
def round_layers(
    layers: Mapping[str, CompressedModule], exact: Mapping[str, nn.Module], grids: Grids, dtype: torch.dtype, moments: Moments | None
) -> None:
    """Round ``layers``, which are changed, the leaders of stacks first.

    Args:
        exact: the same before.
        dtype, moments: as ``scales`` and ``moments`` of ``quantized_handle``.

    Raises:
        NumericalError: as ``quantized_handle``.
    """
    for name in sorted(layers, key=lambda name: getattr(layers[name], "leader", layers[name]) is not layers[name]):
        try:
            if moments is not None:
                _by_gptq(layers[name], exact[name], moments(name), partial(gptq, grid=grids[name], stored_dtype=dtype))
            layers[name].quantize(grids[name], dtype)  # what has no moment, by GPTQ
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from error


def _by_gptq(layer: CompressedModule, exact: nn.Module, moment: Tensor, rounded: Callable[[Tensor, Tensor], QuantizedMatrix]) -> None:
    """Round the matrices of a layer whose inputs have a known moment; ``exact`` is the layer before."""
    if isinstance(layer, DenseLinear):
        layer.store("matrix", rounded(weight_of(exact), moment))
    if not isinstance(layer, StackedLinear):
        return
    assert isinstance(exact, StackedLinear)
    down = exact.shared_down.double().cpu()
    if layer.leader is layer:
        layer.store("down", rounded(exact.shared_down, moment))
    small = layer.shared_down.double().cpu()
    spread = moment @ small.T
    inner = small @ spread
    inner += torch.eye(len(inner), dtype=torch.float64) * (_DAMPING * inner.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
    fit = torch.linalg.solve(inner, (down @ spread).T).T  # (r, r)
    for name, factor in list(layer.stored_factors()):
        if not isinstance(factor, QuantizedMatrix):
            layer.store(name, rounded((factor.double().cpu() @ fit).to(factor), inner))


def quantized(
    model: CompressedModel, grids: Grids, *, scales: torch.dtype | None = None, moments: Moments | None = None
) -> CompressedModel:
    """As ``quantized_handle``, with the counts of the report: scales are counted as parameters, bytes as they are written.

    Raises:
        NumericalError: as ``quantized_handle``.
    """
    handle = quantized_handle(model.handle, grids, scales=scales, moments=moments)
    members = {unit.name: unit.name.split("+") for unit in model.report.units}
    grouped = {name: unit for unit, names in members.items() for name in names}
    report = replace(
        model.report,
        parameters_after=handle.parameters,
        linear_parameters_after=handle.linear_parameters,
        bytes_after=handle.bytes,
        quantization=_words(handle, grids),
        grids={grouped.get(name, name): grid.name for name, grid in grids.items()},
        units=tuple(
            replace(unit, bytes=sum(stored_bytes(handle.module.get_submodule(name), handle.stored_dtype) for name in members[unit.name]))
            for unit in model.report.units
        ),
    )
    return CompressedModel(handle, report)


def _words(handle: ModelHandle, grids: Grids) -> str:
    """Return ``int8`` where factors alone are rounded, ``int4, dense layers int8`` where dense layers are, too."""
    dense = {name for name in grids if isinstance(handle.module.get_submodule(name), DenseLinear)}
    kinds = ("", [name for name in grids if name not in dense]), ("dense layers ", list(dense))
    return ", ".join(f"{kind}{' and '.join(sorted({grids[name].name for name in names}))}" for kind, names in kinds if names)


def stored_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of one layer on disk: floats in ``dtype``, quantised matrices and int32 indices as they are."""
    floats = sum(parameter.numel() for parameter in module.parameters())
    matrices = sum(child.bytes(dtype.itemsize) for child in module.modules() if isinstance(child, QuantizedMatrix))
    indices = module.pivots.numel() * module.pivots.element_size() if isinstance(module, PivotIndex) else 0
    return floats * dtype.itemsize + matrices + indices

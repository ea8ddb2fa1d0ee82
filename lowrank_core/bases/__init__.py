"""Bases: ways to order the directions of a matrix, so that every rank is a slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lowrank_core.accounting import MatrixShape
from lowrank_core.bases.base import Basis, FactorBasis, Factors
from lowrank_core.bases.pooled_feature import POOLED_FEATURE
from lowrank_core.bases.weight_svd import WEIGHT_SVD
from lowrank_core.calibration import LayerStatistics
from lowrank_core.errors import ConfigError
from lowrank_core.models.handle import ModelHandle, bias_of, weight_of

__all__ = ["BASES", "Basis", "FactorBasis", "Factors", "basis_named", "factorize", "priced_shapes"]

BASES: dict[str, Basis] = {method.name: method for method in (POOLED_FEATURE, WEIGHT_SVD)}


def basis_named(name: str) -> Basis:
    """Return the basis ``name``.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    if name not in BASES:
        raise ConfigError(f"basis must be one of {', '.join(BASES)}; got {name!r}.")
    return BASES[name]


def priced_shapes(handle: ModelHandle, basis: str) -> tuple[MatrixShape, ...]:
    """Return the model's matrices as price lists under ``basis``.

    Raises:
        ConfigError: no such basis.
    """
    adds_bias = basis_named(basis).adds_bias
    return tuple(replace(shape, adds_bias=adds_bias) for shape in handle.shapes)


def factorize(
    handle: ModelHandle, statistics: LayerStatistics, basis: str, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, FactorBasis]:
    """Decompose every compressible layer once, in float64 on the CPU.

    Raises:
        ConfigError: no such basis.
        NumericalError: NaN, Inf or no convergence; names the layer.
    """
    method = basis_named(basis)
    shapes = priced_shapes(handle, basis)
    groups = {layer.name: layer.input_group for layer in handle.layers}
    found = {}
    for done, shape in enumerate(shapes, start=1):
        module = handle.module.get_submodule(shape.name)
        weight = weight_of(module).detach().to("cpu", torch.float64)
        bias = bias_of(module)
        bias = None if bias is None else bias.detach().to("cpu", torch.float64)
        found[shape.name] = method.factorize(shape, weight, bias, statistics.inputs[groups[shape.name]])
        if progress is not None:
            progress(done, len(shapes))
    return found

"""All of a model's units, decomposed: what allocators price and trials slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from lowrank_core.allocation import ErrorCurves
from lowrank_core.allocation.units import plan_units
from lowrank_core.config import CompressionConfig
from lowrank_core.decomposition.factorization import Damping, FactorBasis, column_metric, factorize_unit
from lowrank_core.decomposition.head_factorization import HeadBasis, factorize_heads, reduce_heads
from lowrank_core.decomposition.module_reduction import PairBasis, WidthBasis, reduce_pairs, reduce_width
from lowrank_core.errors import ConfigError
from lowrank_core.linalg import Damped
from lowrank_core.metrics import LayerData, metric_of
from lowrank_core.models.attention import head_units
from lowrank_core.models.handle import ModelHandle, bias_of, weight_of
from lowrank_core.models.modules import find_modules
from lowrank_core.parameters import HeadUnit, MatrixShape, PairUnit, Unit, WidthUnit
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.types import Progress

__all__ = [
    "AnyBasis",
    "Bases",
    "damping_of",
    "error_curves",
    "factorize",
    "factorized",
    "operand_of",
    "shrinkage_of",
    "units_by_block",
    "units_of",
]

AnyBasis = FactorBasis | HeadBasis | WidthBasis | PairBasis

Bases = Mapping[str, AnyBasis]
"""Unit name -> its nested factors."""


def units_of(handle: ModelHandle, config: CompressionConfig) -> tuple[Unit, ...]:
    """Return the units of a model under ``config``, alternatives included.

    Raises:
        ConfigError: no such basis, or modules are to be reduced and none can be.
    """
    joint: Sequence[Unit] = find_modules(handle).units if config.modules else head_units(handle) if config.heads else ()
    return plan_units(handle.shapes, config, joint)


def damping_of(config: CompressionConfig) -> Damping:
    return Damping(columns=config.input_damping, rows=config.gradient_damping)


def shrinkage_of(config: CompressionConfig) -> list[float]:
    """Return what keys say of the shrinkage: nothing where there is none, as keys of earlier versions."""
    return [config.input_shrinkage, config.gradient_shrinkage] if config.input_shrinkage or config.gradient_shrinkage else []


def operand_of(handle: ModelHandle, statistics: LayerStatistics, shape: MatrixShape) -> LayerData:
    """Return a matrix of the model with its statistics, in float64 on the CPU."""
    module = handle.module.get_submodule(shape.name)
    bias = bias_of(module)
    return LayerData(
        shape=shape,
        weight=weight_of(module).detach().to("cpu", torch.float64),
        bias=None if bias is None else bias.detach().to("cpu", torch.float64),
        inputs=statistics.inputs[shape.input_group],
        outputs=statistics.outputs.get(shape.name),
    )


def factorize(
    handle: ModelHandle,
    statistics: LayerStatistics,
    units: Sequence[Unit],
    config: CompressionConfig,
    *,
    progress: Progress | None = None,
) -> dict[str, AnyBasis]:
    """Decompose every unit once, in float64 on the CPU.

    Raises:
        ConfigError: no such basis, or it needs gradients and the statistics have none.
        NumericalError: NaN, Inf or no convergence; names the layer.
    """
    result: dict[str, AnyBasis] = {}
    for block in units_by_block(units).values():
        for unit, factors in factorized(handle, statistics, block, config):
            result[unit.name] = factors
            if progress is not None:
                progress(len(result), len(units))
    return {unit.name: result[unit.name] for unit in units}


def units_by_block(units: Sequence[Unit]) -> dict[int, list[Unit]]:
    """Return the units by the depth of their first member, ascending."""
    result: dict[int, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: unit.members[0].depth):
        result.setdefault(unit.members[0].depth, []).append(unit)
    return result


def factorized(
    handle: ModelHandle, statistics: LayerStatistics, units: Sequence[Unit], config: CompressionConfig
) -> Iterator[tuple[Unit, AnyBasis]]:
    """Yield the factors of each unit of a block; those that read the same inputs share the damped metric of these.

    Raises:
        as ``factorize``.
    """
    basis, damping = metric_of(config), damping_of(config)
    if basis.needs_gradients and not statistics.outputs:
        raise ConfigError(
            f"{basis.label} weighs outputs by their gradients, which were not collected. Collect them with `collect_gradients`."
        )
    shared: dict[tuple[str, ...], Damped | None] = {}
    for unit in units:
        operands = [operand_of(handle, statistics, member) for member in unit.members]
        if unit.joint:
            yield unit, _jointly(unit, operands, config)
            continue
        inputs = [member.input_group for member in unit.members]
        key = tuple(inputs if len(set(inputs)) > 1 else inputs[:1])
        if key not in shared:
            members = operands if len(key) > 1 else operands[:1]
            shared[key] = column_metric([basis.metric(operand) for operand in members], damping, unit.name)
        yield unit, factorize_unit(unit, operands, basis, damping, shared[key])


def _jointly(unit: Unit, operands: Sequence[LayerData], config: CompressionConfig) -> AnyBasis:
    """Return the factors of a unit whose members compute through each other."""
    damping = damping_of(config)
    if isinstance(unit, WidthUnit):
        return reduce_width(unit, operands, damping)
    first, second = operands
    if isinstance(unit, PairUnit):
        return reduce_pairs(unit, first, second)
    assert isinstance(unit, HeadUnit)
    if config.modules:
        return reduce_heads(unit, first, second, damping)
    return factorize_heads(unit, first, second, metric_of(config), damping)


def error_curves(bases: Bases) -> ErrorCurves:
    """Return e_0 … e_k of every unit, for allocators that know errors."""
    return {name: np.asarray(basis.errors.numpy(), dtype=np.float64) for name, basis in bases.items()}

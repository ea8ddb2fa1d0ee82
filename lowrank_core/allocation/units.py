"""Units of an allocation under a metric and a storage, with prices by rank. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowrank_core.allocation import AllocationProblem, Ranks, allocate, module_group
from lowrank_core.config import CompressionConfig
from lowrank_core.metrics import by_input, metric_of
from lowrank_core.parameters import HeadUnit, MatrixShape, Unit

__all__ = ["check_reachable", "plan_units", "value_layers"]


def value_layers(shapes: Sequence[MatrixShape]) -> tuple[str, ...]:
    """Return the names of the value projections: what a pass showed to be one, or is called one."""
    return tuple(shape.name for shape in shapes if shape.role == "v" or module_group(shape.kind) == "v")


def plan_units(shapes: Sequence[MatrixShape], config: CompressionConfig, heads: Sequence[HeadUnit] = ()) -> tuple[Unit, ...]:
    """Return the units that ``config`` asks for, in the order of the model.

    With ``config.stacks``, stacks of shared inputs stand next to the single matrices as alternatives, and with ``config.heads`` the
    per-head units ``heads`` of the model: an allocator that knows the errors takes the cheapest. Value projections that stay dense
    are in neither.

    Raises:
        ConfigError: no such basis, or it can't be shrunk.
    """
    basis = metric_of(config)
    dense = set(value_layers(shapes)) if config.value_dense else set()
    free = [shape for shape in shapes if shape.name not in dense]
    groups = list(basis.grouping(free))
    if config.stacks:
        groups += [group for group in by_input(free) if len(group) > 1 and group not in groups]
    groups += [(shape,) for shape in shapes if shape.name in dense]
    order = {shape.name: index for index, shape in enumerate(shapes)}
    units = [Unit(group, config.storage, basis.centred) for group in groups]
    if config.heads and not config.value_dense:
        units += [replace(unit, adds_bias=basis.centred) for unit in heads]
    return tuple(sorted(units, key=lambda unit: (order[unit.members[0].name], len(unit.members))))


def check_reachable(units: Sequence[Unit], compression_ratio: float, config: CompressionConfig, *, fixed: Ranks | None = None) -> None:
    """Raise unless some allocation meets the ratio, with the ranks that are ``fixed``: checked before minutes of work.

    Raises:
        BudgetError: it can't be met.
        ConfigError, RankError: ``fixed`` are not ranks of these units.
    """
    locked = AllocationProblem(tuple(units), compression_ratio, fixed=fixed or {}).fixed
    plain = [unit for unit in units if len(unit.members) == 1 or unit.name in locked]
    shapes = {member.name: member for unit in units for member in unit.members}
    if {member.name for unit in plain for member in unit.members} == set(shapes):
        dense = value_layers(list(shapes.values())) if config.value_dense else ()
        allocate("uniform", plain, compression_ratio, keep_dense=dense, fixed=locked)

"""Units of an allocation under a metric and a storage, with prices by rank. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowrank_core.allocation import AllocationProblem, Ranks, allocate, module_group
from lowrank_core.config import CompressionConfig
from lowrank_core.errors import ConfigError
from lowrank_core.metrics import by_input, metric_of
from lowrank_core.parameters import HeadUnit, MatrixShape, Unit

__all__ = ["check_reachable", "dense_layers", "plan_units", "value_layers"]


def value_layers(shapes: Sequence[MatrixShape]) -> tuple[str, ...]:
    """Return the names of the value projections: what a pass showed to be one, or is called one."""
    return tuple(shape.name for shape in shapes if shape.role == "v" or module_group(shape.kind) == "v")


def dense_layers(units: Sequence[Unit], config: CompressionConfig) -> tuple[str, ...]:
    """Return the names of the matrices that ``config`` leaves as they are: value projections, or what is in no module to reduce."""
    if config.modules:
        return tuple(unit.name for unit in units if not unit.joint)
    members = {member.name: member for unit in units for member in unit.members}
    return value_layers(list(members.values())) if config.value_dense else ()


def plan_units(shapes: Sequence[MatrixShape], config: CompressionConfig, joint: Sequence[Unit] = ()) -> tuple[Unit, ...]:
    """Return the units that ``config`` asks for, in the order of the model.

    With ``config.stacks``, stacks of shared inputs stand next to the single matrices as alternatives, and with ``config.heads`` the
    per-head units among the ``joint`` ones of the model: an allocator that knows the errors takes the cheapest. Value projections that
    stay dense are in neither. With ``config.modules`` they are the ``joint`` ones, and what is in none of them as single matrices.

    Raises:
        ConfigError: no such basis, it can't be shrunk, or there are no modules to reduce.
    """
    basis = metric_of(config)
    if config.modules:
        return _by_modules(shapes, config, joint)
    dense = set(value_layers(shapes)) if config.value_dense else set()
    free = [shape for shape in shapes if shape.name not in dense]
    groups = list(basis.grouping(free))
    if config.stacks:
        groups += [group for group in by_input(free) if len(group) > 1 and group not in groups]
    groups += [(shape,) for shape in shapes if shape.name in dense]
    order = {shape.name: index for index, shape in enumerate(shapes)}
    units = [Unit(group, config.storage, basis.centred) for group in groups]
    if config.heads and not config.value_dense:
        units += [replace(unit, adds_bias=basis.centred) for unit in joint if isinstance(unit, HeadUnit)]
    return tuple(sorted(units, key=lambda unit: (order[unit.members[0].name], len(unit.members))))


def _by_modules(shapes: Sequence[MatrixShape], config: CompressionConfig, joint: Sequence[Unit]) -> tuple[Unit, ...]:
    dense = set(value_layers(shapes)) if config.value_dense else set()
    units = [unit for unit in joint if not dense & {member.name for member in unit.members}]
    if not units:
        raise ConfigError(
            "modules: this model has no MLP and no attention of separate projections that could be reduced as modules (a run of an earlier "
            "version has not looked for them: start it again). Choose another preset, or leave --modules out."
        )
    covered = {member.name for unit in units for member in unit.members}
    order = {shape.name: index for index, shape in enumerate(shapes)}
    return tuple(sorted([*units, *(Unit((s,)) for s in shapes if s.name not in covered)], key=lambda unit: order[unit.members[0].name]))


def check_reachable(units: Sequence[Unit], compression_ratio: float, config: CompressionConfig, *, fixed: Ranks | None = None) -> None:
    """Raise unless some allocation meets the ratio, with the ranks that are ``fixed``: checked before minutes of work.

    Raises:
        BudgetError: it can't be met.
        ConfigError, RankError: ``fixed`` are not ranks of these units.
    """
    locked = AllocationProblem(tuple(units), compression_ratio, fixed=fixed or {}).fixed
    plain = [unit for unit in units if config.modules or len(unit.members) == 1 or unit.name in locked]
    if {member.name for unit in plain for member in unit.members} == {member.name for unit in units for member in unit.members}:
        allocate("uniform", plain, compression_ratio, keep_dense=dense_layers(units, config), fixed=locked)

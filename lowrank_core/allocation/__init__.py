"""Allocators: rules that turn a parameter budget into a rank for each matrix. Torch-free."""

from collections.abc import Collection, Sequence

from lowrank_core.accounting import MatrixShape
from lowrank_core.allocation.base import Allocator, RankAllocation, allocation_from_ranks, module_group, project, read_ranks
from lowrank_core.allocation.lord_manual import LORD_MANUAL
from lowrank_core.allocation.uniform import UNIFORM
from lowrank_core.errors import ConfigError

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "RankAllocation",
    "allocate",
    "allocation_from_ranks",
    "allocator_named",
    "module_group",
    "project",
    "read_ranks",
]

ALLOCATORS: dict[str, Allocator] = {method.name: method for method in (UNIFORM, LORD_MANUAL)}


def allocator_named(name: str) -> Allocator:
    """Return the allocator ``name``.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    if name not in ALLOCATORS:
        raise ConfigError(f"allocation must be one of {', '.join(ALLOCATORS)}; got {name!r}.")
    return ALLOCATORS[name]


def allocate(name: str, matrices: Sequence[MatrixShape], ratio: float, *, keep_dense: Collection[str] = ()) -> RankAllocation:
    """Spend the budget of compression ratio ``ratio`` by the allocator ``name``.

    Raises:
        ConfigError: no such allocator.
        BudgetError: the ratio can't be met.
    """
    wishes = allocator_named(name).multipliers(matrices)
    return project(matrices, wishes, ratio, keep_dense=keep_dense, allocator=name)

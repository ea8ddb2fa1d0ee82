"""Allocators: rules that turn a parameter budget into a rank for each unit. Torch-free."""

from collections.abc import Collection, Sequence

from lowrank_core.accounting import Unit
from lowrank_core.allocation.base import (
    AllocationProblem,
    Allocator,
    ErrorCurves,
    RankAllocation,
    Ranks,
    allocation_from_ranks,
    module_group,
    read_ranks,
)
from lowrank_core.allocation.lord_manual import LORD_MANUAL
from lowrank_core.allocation.marginal import MARGINAL
from lowrank_core.allocation.projection import ByMultipliers, kept_fractions, project
from lowrank_core.allocation.uniform import UNIFORM
from lowrank_core.errors import ConfigError

__all__ = [
    "ALLOCATORS",
    "AllocationProblem",
    "Allocator",
    "ByMultipliers",
    "ErrorCurves",
    "RankAllocation",
    "Ranks",
    "allocate",
    "allocation_from_ranks",
    "allocator_named",
    "floored",
    "kept_fractions",
    "module_group",
    "project",
    "read_ranks",
    "rounded_down",
]

ALLOCATORS: dict[str, Allocator] = {method.name: method for method in (UNIFORM, LORD_MANUAL, MARGINAL)}


def allocator_named(name: str) -> Allocator:
    """Return the allocator ``name``.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    if name not in ALLOCATORS:
        raise ConfigError(f"allocation must be one of {', '.join(ALLOCATORS)}; got {name!r}.")
    return ALLOCATORS[name]


def allocate(
    name: str, units: Sequence[Unit], ratio: float, *, keep_dense: Collection[str] = (), curves: ErrorCurves | None = None
) -> RankAllocation:
    """Spend the budget of compression ratio ``ratio`` by the allocator ``name``.

    Args:
        keep_dense: names of matrices that stay as they are.
        curves: errors by unit, for an allocator that needs them.

    Raises:
        ConfigError: no such allocator, or it needs errors and there are none.
        BudgetError: the ratio can't be met.
    """
    problem = AllocationProblem(tuple(units), ratio, frozenset(keep_dense), curves)
    return allocation_from_ranks(name, units, allocator_named(name).ranks(problem))


def floored(rank: int, multiple: int) -> int:
    """Return ``rank`` rounded down to a multiple of ``multiple``; a smaller one stays, so that no rank rises."""
    return rank if rank < multiple else rank - rank % multiple


def rounded_down(allocation: RankAllocation, units: Sequence[Unit], multiple: int) -> RankAllocation:
    """Return ``allocation`` with every rank ``floored``."""
    if multiple == 1:
        return allocation
    ranks = {name: None if rank is None else floored(rank, multiple) for name, rank in allocation.ranks.items()}
    return allocation_from_ranks(allocation.allocator, units, ranks)

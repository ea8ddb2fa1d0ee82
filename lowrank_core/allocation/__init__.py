"""Allocators: rules that turn a parameter budget into a rank for each unit. Torch-free."""

from collections.abc import Collection, Mapping, Sequence

from lowrank_core.allocation.base import ErrorCurves, Perplexities, RankAllocation, Ranks, allocation_from_ranks, module_group, round_down
from lowrank_core.allocation.block_influence import BlockInfluence
from lowrank_core.allocation.draft import Draft, DraftHistory, began
from lowrank_core.allocation.energy import Energy
from lowrank_core.allocation.files import AllocationFile, parse_allocation, read_allocation, read_ranks
from lowrank_core.allocation.former_names import current_name, with_current_names
from lowrank_core.allocation.lagrangian import Lagrangian
from lowrank_core.allocation.lems import DepthBias, Lems
from lowrank_core.allocation.lord_manual import LordManual
from lowrank_core.allocation.problem import AllocationProblem, Allocator
from lowrank_core.allocation.projection import ByMultipliers, kept_fractions, project
from lowrank_core.allocation.svd_llm_v2 import SvdLlmV2
from lowrank_core.allocation.threshold import Threshold
from lowrank_core.allocation.truncation_search import TruncationSearch
from lowrank_core.allocation.uniform import Uniform
from lowrank_core.allocation.unspent import unspent_parameters, unspent_warning, unspent_words
from lowrank_core.config import check_choice
from lowrank_core.parameters import Unit

__all__ = [
    "ALLOCATORS",
    "RULES",
    "AllocationFile",
    "AllocationProblem",
    "Allocator",
    "ByMultipliers",
    "DepthBias",
    "Draft",
    "DraftHistory",
    "ErrorCurves",
    "Perplexities",
    "RankAllocation",
    "Ranks",
    "allocate",
    "allocation_from_ranks",
    "allocator_named",
    "began",
    "current_name",
    "round_down",
    "kept_fractions",
    "module_group",
    "parse_allocation",
    "project",
    "read_allocation",
    "read_ranks",
    "round_ranks_down",
    "unspent_parameters",
    "unspent_warning",
    "unspent_words",
    "with_current_names",
]

_METHODS: tuple[Allocator, ...] = (
    *(Uniform(), LordManual(), Energy(), Threshold()),
    *(SvdLlmV2(), BlockInfluence(), TruncationSearch(), Lagrangian(), Lems()),
)

ALLOCATORS: dict[str, Allocator] = {method.name: method for method in _METHODS}

RULES: dict[str, Allocator] = {name: method for name, method in ALLOCATORS.items() if not method.measures}
"""Those that work from what every run keeps; the others first measure the model."""


def allocator_named(name: str) -> Allocator:
    """Return the allocator ``name``, which may be that of an earlier version.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    name = current_name(name)
    check_choice("allocation", name, ALLOCATORS)
    return ALLOCATORS[name]


def allocate(
    name: str,
    units: Sequence[Unit],
    ratio: float,
    *,
    keep_dense: Collection[str] = (),
    curves: ErrorCurves | None = None,
    fixed: Ranks | None = None,
    weights: Mapping[str, float] | None = None,
    influence: Sequence[float] = (),
    perplexities: Perplexities | None = None,
    rank_multiple: int = 1,
) -> RankAllocation:
    """Spend the budget of compression ratio ``ratio`` by the allocator ``name``.

    Args:
        keep_dense: names of matrices that stay as they are.
        curves: errors by unit, for an allocator that needs them.
        fixed: ranks by unit that the user chose; the result has them unchanged, as ``locked``.
        weights: positive, on the errors of units, for an allocator that trades errors (1 where there is none) or needs weights.
        influence: of each block, by depth, for an allocator that needs it.
        perplexities: of the model with one unit cut alone, for an allocator that needs them.
        rank_multiple: ranks that an allocator may take that does not leave this to ``round_ranks_down``.

    Raises:
        ConfigError: no such allocator, it needs errors, influences, perplexities or weights and there are none, or it can't choose
            between alternatives; or ``fixed`` or ``weights`` are not those of the units.
        RankError: a fixed rank outside its limits.
        BudgetError: the ratio can't be met.
    """
    rule = allocator_named(name)
    problem = AllocationProblem(
        tuple(units), ratio, frozenset(keep_dense), curves, fixed or {}, weights or {}, influence, perplexities or {}, rank_multiple
    )
    return allocation_from_ranks(rule.name, units, problem.completed(rule.ranks(problem)), locked=problem.fixed, allocator=rule.name)


def round_ranks_down(allocation: RankAllocation, units: Sequence[Unit], multiple: int) -> RankAllocation:
    """Return ``allocation`` with every rank ``round_down`` that is not locked."""
    if multiple == 1:
        return allocation
    locked = allocation.locked
    ranks = {n: rank if rank is None or n in locked else round_down(rank, multiple) for n, rank in allocation.ranks.items()}
    return allocation_from_ranks(allocation.label, units, ranks, locked=locked, allocator=allocation.allocator)

"""The search for ranks of ASVD: one threshold on the perplexity of the model with one matrix cut alone.

Notation::

    k       kept fraction of a unit's parameters, of a grid in (0, 1); 1 stands for dense
    P_u(k)  perplexity of the model with unit u alone at k; infinite where the model diverges
    cuts    all pairs (u, k), the largest P_u(k) first
    k_u(i)  what u keeps if all cuts from the i-th on are made: the smallest k of those that are u's, or 1

The sum of k_u(i) times the parameters of u never falls with i, so the threshold that spends the budget is found by bisection.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_core.allocation.base import Perplexities, Ranks
from lowrank_core.allocation.problem import AllocationProblem, Allocator
from lowrank_core.allocation.projection import project
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import Unit

__all__ = ["TruncationSearch"]

Cut = tuple[str, float]
"""A unit's name, and the fraction of its parameters that it keeps."""


@dataclass(frozen=True)
class TruncationSearch(Allocator):
    """Sensitivity-based truncation rank search (STRS) of ASVD, arXiv 2312.05821, §3.4.

    The published code stops at a whole cut, at the last one that its bisection looked at: just below the nominal ratio or just above. Here
    the cut at the threshold is made in part, such that the budget is spent exactly; every other unit keeps what the published threshold
    leaves it. A budget below the whole grid is met by scaling all units down alike, where the published code stays above it.
    """

    name: str = "truncation_search"
    label: str = "Sensitivity-based truncation rank search (ASVD)"
    reference: str = "arXiv 2312.05821"
    needs_perplexities = True

    def ranks(self, problem: AllocationProblem) -> Ranks:
        free = problem.without_alternatives()
        known = _known(problem, free)
        cuts = sorted(((u, k, p) for u, grid in known.items() for k, p in sorted(grid.items())), key=lambda cut: -cut[2])
        return project(problem, _kept(free, [(unit, kept) for unit, kept, _ in cuts], problem.available))


def _known(problem: AllocationProblem, free: Sequence[Unit]) -> Perplexities:
    missing = [unit.name for unit in free if unit.name not in problem.perplexities]
    if missing:
        raise ConfigError(
            f"the allocation truncation_search needs the perplexity of the model with each matrix cut alone, and that of {missing[0]} was "
            "not measured. Use `lowrank compress --allocation truncation_search`, which measures it, or compare with the preset asvd."
        )
    return {unit.name: problem.perplexities[unit.name] for unit in free}


def _kept(free: Sequence[Unit], cuts: Sequence[Cut], available: int) -> dict[str, float]:
    """Return the fraction that each unit keeps, together ``available`` parameters where the cuts reach so low."""
    sizes = {unit.name: unit.dense_parameters for unit in free}

    def spent(kept: Mapping[str, float]) -> float:
        return sum(kept[name] * size for name, size in sizes.items())

    def after(first: int) -> dict[str, float]:
        kept = dict.fromkeys(sizes, 1.0)
        for name, fraction in cuts[first:]:
            kept[name] = min(kept[name], fraction)
        return kept

    first = bisect.bisect_right(range(len(cuts) + 1), float(available), key=lambda index: spent(after(index))) - 1
    kept = after(max(0, first))
    if 0 <= first < len(cuts):
        name = cuts[first][0]
        kept[name] = min(1.0, kept[name] + (available - spent(kept)) / sizes[name])
    return kept

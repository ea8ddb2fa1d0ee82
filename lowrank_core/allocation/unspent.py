"""Budget left unspent by rounding. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.allocation.base import RankAllocation
from lowrank_core.parameters import Unit, budget_for_ratio, compression_ratio

__all__ = ["SHARE_TOLD", "unspent_parameters", "unspent_warning", "unspent_words"]

SHARE_TOLD = 0.01
"""Of the budget: more than this unspent is said."""


def unspent_parameters(units: Sequence[Unit], ratio: float, allocation: RankAllocation) -> int:
    """Return the parameters that the budget of compression ratio ``ratio`` allows and ``allocation`` does not use; negative above it."""
    return budget_for_ratio(units, ratio) - allocation.parameters


def unspent_warning(units: Sequence[Unit], ratio: float, allocation: RankAllocation, multiple: int) -> tuple[str, ...]:
    """Return what to say where ranks in multiples of ``multiple`` leave more than ``SHARE_TOLD`` of the budget, or nothing."""
    return unspent_words(budget_for_ratio(units, ratio), allocation.parameters, allocation.dense_parameters, ratio, multiple)


def unspent_words(budget: int, parameters: int, dense: int, ratio: float, multiple: int) -> tuple[str, ...]:
    """Return the same from the counts alone: of the budget, of what is used of it, and of the dense matrices."""
    left = budget - parameters
    if multiple == 1 or left <= SHARE_TOLD * budget:
        return ()
    return (
        f"{left:,} of the budget's {budget:,} parameters ({left / budget:.1%}) are not spent: ranks are rounded down to multiples of "
        f"{multiple}, so that {compression_ratio(dense, parameters):.1%} is removed where {ratio:.1%} was asked for. Give basis and "
        "allocation yourself instead of the preset, and every parameter is spent.",
    )

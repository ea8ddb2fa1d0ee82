"""What an allocation is, and how any set of wishes is projected onto a parameter budget.

Notation::

    k_i   kept fraction of matrix i, in (0, 1]; 1 means dense
    x_i   multiplier of matrix i: only ratios between multipliers matter
    s     common scale with  Σ cost_i(min(1, s·x_i)) = budget,  found by bisection
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lowrank_core.accounting import MatrixShape, allocated_parameters, budget_for_ratio, compression_ratio
from lowrank_core.errors import BudgetError, ConfigError

__all__ = ["Allocator", "RankAllocation", "allocation_from_ranks", "module_group", "project", "read_ranks"]

_BISECTION_STEPS = 100  # halves the bracket to below one part in 2^100: exact in float64

_GROUPS = {"q_proj": "qk", "k_proj": "qk", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def module_group(kind: str) -> str:
    """Return the group that shares a variable of the search: q and k together as in the paper, else the type itself."""
    return _GROUPS.get(kind, kind)


@dataclass(frozen=True)
class RankAllocation:
    """Ranks that meet a budget. ``ranks[name]`` is None where the matrix stays dense."""

    allocator: str
    ranks: Mapping[str, int | None]
    parameters: int
    dense_parameters: int

    @property
    def compression_ratio(self) -> float:
        """Fraction of the compressible linears' parameters removed."""
        return compression_ratio(self.dense_parameters, self.parameters)

    def to_json(self) -> str:
        body = {
            "allocator": self.allocator,
            "compression_ratio": self.compression_ratio,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "ranks": dict(self.ranks),
        }
        return json.dumps(body, indent=1)


class Allocator(Protocol):
    """A rule that spends a budget."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def reference(self) -> str: ...
    def multipliers(self, matrices: Sequence[MatrixShape]) -> dict[str, float]:
        """Return a positive multiplier for the kept fraction of each matrix, by name."""


def allocation_from_ranks(allocator: str, matrices: Sequence[MatrixShape], ranks: Mapping[str, int | None]) -> RankAllocation:
    """Return ``ranks`` as an allocation, with its counts.

    A rank whose factors would cost as much as the matrix is stored dense: never larger than dense.

    Raises:
        ConfigError: a name that is not a compressible layer.
        RankError: a rank outside its limits.
    """
    known = {matrix.name: matrix for matrix in matrices}
    unknown = sorted(set(ranks) - set(known))
    if unknown:
        raise ConfigError(f"ranks: {unknown[0]!r} is no compressible layer of this model; its layers are named like {next(iter(known))!r}.")
    stored: dict[str, int | None] = {}
    for matrix in matrices:
        rank = ranks.get(matrix.name)
        cost = matrix.parameters(rank)  # checks the rank
        stored[matrix.name] = rank if cost < matrix.dense_parameters else None
    dense = sum(matrix.dense_parameters for matrix in matrices)
    return RankAllocation(allocator, stored, allocated_parameters(matrices, stored), dense)


def read_ranks(path: str | os.PathLike[str]) -> dict[str, int | None]:
    """Read ``{layer: rank or null}``, or an allocation file that holds it under ``ranks``.

    Raises:
        ConfigError: the file is missing, is not JSON or holds anything else.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"ranks: can't read {path}: {error}.") from error
    ranks = body.get("ranks", body) if isinstance(body, dict) else None
    if not isinstance(ranks, dict) or not all(value is None or type(value) is int for value in ranks.values()):
        raise ConfigError(f"ranks: {path} must hold a JSON object that maps layer names to a whole number or null (dense).")
    return ranks


def project(
    matrices: Sequence[MatrixShape],
    multipliers: Mapping[str, float],
    ratio: float,
    *,
    keep_dense: Collection[str] = (),
    allocator: str = "projection",
) -> RankAllocation:
    """Spend the budget of compression ratio ``ratio`` in proportion to ``multipliers``.

    The result never costs more than the budget, and less by under the cheapest step that is left.

    Args:
        matrices: every compressible matrix, locked ones included: the ratio counts them all.
        multipliers: positive, by name; only their ratios matter.
        ratio: fraction of the parameters to remove, in [0, 1).
        keep_dense: names that stay as they are.

    Raises:
        BudgetError: even rank 1 everywhere costs more than the budget.
    """
    budget = budget_for_ratio(matrices, ratio)
    free = [m for m in matrices if m.name not in keep_dense and m.break_even_rank > 0]
    locked = sum(m.dense_parameters for m in matrices) - sum(m.dense_parameters for m in free)
    available = budget - locked
    least = sum(m.parameters(1) for m in free)
    if available < least:
        dense = sum(m.dense_parameters for m in matrices)
        most = compression_ratio(dense, locked + least)
        raise BudgetError(
            f"compression ratio {ratio:g} can't be met: the matrices that stay dense, with rank 1 everywhere else, "
            f"remove only {most:.3f}. "
            "Lower the ratio, or compress the value projections too."
        )
    wishes = _scaled_wishes(free, multipliers, available)
    ranks: dict[str, int | None] = {m.name: None for m in matrices}
    ranks.update({m.name: m.rank_for_parameters(wishes[m.name]) for m in free})
    _shrink_to_fit(free, ranks, wishes, available)
    _spend_remainder(free, ranks, wishes, available)
    return allocation_from_ranks(allocator, matrices, ranks)


def _scaled_wishes(free: Sequence[MatrixShape], multipliers: Mapping[str, float], available: int) -> dict[str, float]:
    """Return the parameters that each matrix would get, if ranks were continuous."""

    def wishes(scale: float) -> dict[str, float]:
        return {m.name: min(1.0, scale * multipliers[m.name]) * m.dense_parameters for m in free}

    if not free:
        return {}
    low, high = 0.0, 1.0 / min(multipliers[m.name] for m in free)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wishes(middle).values()) <= available else (low, middle)
    return wishes(high)


def _shrink_to_fit(free: Sequence[MatrixShape], ranks: dict[str, int | None], wishes: Mapping[str, float], available: int) -> None:
    """Take ranks away where the minimum of rank 1 pushed the total over the budget; the least missed first."""
    spent = sum(m.parameters(ranks[m.name]) for m in free)
    while spent > available:
        shrinkable = [m for m in free if ranks[m.name] != 1]
        matrix = max(shrinkable, key=lambda m: (m.parameters(ranks[m.name]) - wishes[m.name]) / m.rank_step)
        rank = ranks[matrix.name]
        before = matrix.parameters(rank)
        ranks[matrix.name] = matrix.break_even_rank if rank is None else rank - 1
        spent -= before - matrix.parameters(ranks[matrix.name])


def _spend_remainder(free: Sequence[MatrixShape], ranks: dict[str, int | None], wishes: Mapping[str, float], available: int) -> None:
    """Add single ranks, the furthest below its wish first, until no step fits."""
    left = available - sum(m.parameters(ranks[m.name]) for m in free)
    by_name = {m.name: m for m in free}

    def entry(matrix: MatrixShape) -> tuple[float, str]:
        return (matrix.parameters(ranks[matrix.name]) - wishes[matrix.name]) / matrix.rank_step, matrix.name

    heap = [entry(m) for m in free if ranks[m.name] is not None]
    heapq.heapify(heap)
    while heap:
        matrix = by_name[heapq.heappop(heap)[1]]
        rank = ranks[matrix.name]
        assert rank is not None
        following = rank + 1 if rank < matrix.break_even_rank else None
        step = matrix.parameters(following) - matrix.parameters(rank)
        if step > left:
            continue  # no later step of this matrix is cheaper, but for the last one to dense: tried when it is next
        left -= step
        ranks[matrix.name] = following
        if following is not None:
            heapq.heappush(heap, entry(matrix))

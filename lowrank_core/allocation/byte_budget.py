"""Optimal allocation of bytes: each unit's rank and grid by one slope. Torch-free.

Notation::

    g               a grid of whole numbers, or floats
    c_u(r, g)       bytes of unit u at rank r, or dense, with its matrices on g
    e_u(r)          error of truncation at rank r; dense leaves none
    q_u(r, g)       error of rounding what is stored at rank r to g; none in floats

Truncation and rounding err independently, so that a choice leaves e_u(r) + q_u(r, g). Each unit's choices are those that leave less than
every cheaper one; ``Market`` trades them as it trades parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lowrank_core.allocation.base import RankAllocation, allocation_from_ranks
from lowrank_core.allocation.lagrangian import Lagrangian, Market
from lowrank_core.allocation.problem import AllocationProblem
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.files.grids import GRIDS, Grid
from lowrank_core.parameters import Unit, dense_parameters

__all__ = ["FLOAT_BYTES", "RoundingErrors", "allocate_bytes", "bytes_for_ratio", "bytes_on", "chosen_words", "stored_bytes_of"]

RoundingErrors = Mapping[str, Mapping[str, npt.NDArray[np.float64]]]
"""Unit -> grid -> q at the ranks 1 … break-even, then of the dense matrices; a unit or grid that is not there is offered in floats only."""

FLOAT_BYTES = 2
"""Of a float of the dense model that a ratio of bytes is counted from: 16 bits, whatever the checkpoint has."""


@dataclass(frozen=True)
class _Choice:
    cost: int
    error: float
    rank: int | None
    grid: str


def bytes_for_ratio(problem: AllocationProblem) -> int:
    """Return the bytes that the compressible layers may take: (1 - ratio) times what they take in 16 bits, biases included."""
    return int((1 - problem.compression_ratio) * FLOAT_BYTES * dense_parameters(problem.units))


def bytes_on(grid: Grid, units: Sequence[Unit], itemsize: int) -> int:
    """Return the bytes of the compressible layers where all stay dense on a grid."""
    members = {member.name: member for unit in units for member in unit.members}
    return sum(Unit((member,)).bytes(None, itemsize, grid) for member in members.values())


def allocate_bytes(problem: AllocationProblem, rounding: RoundingErrors, limit: int, itemsize: int) -> RankAllocation:
    """Return the ranks and grids that minimise the error in at most ``limit`` bytes of the compressible layers.

    Args:
        problem: units, error curves and weights; its ratio is not read.
        itemsize: bytes of a float as it is written.

    Raises:
        BudgetError: the bytes can't be met.
        ConfigError: ranks are locked, or the errors of the units are not known.
    """
    if problem.fixed:
        raise ConfigError("a budget of bytes takes no locked ranks. Unlock them, or give a budget of parameters.")
    units = problem.units
    offered = [_worthwhile(_choices(problem, unit, rounding.get(unit.name, {}), itemsize)) for unit in units]
    market = Market.of([([each.cost for each in row], [each.error for each in row]) for row in offered], units)
    if market.minimum > limit:
        raise BudgetError(
            f"{limit:,} bytes can't be met: the compressible layers take at least {market.minimum:,}. Lower the ratio to at most "
            f"{1 - market.minimum / (FLOAT_BYTES * dense_parameters(units)):.3f}."
        )
    chosen = {units[row]: offered[row][choice] for row, choice in market.choices(limit).items()}
    ranks = problem.completed({unit.name: each.rank for unit, each in chosen.items()})
    result = allocation_from_ranks(Lagrangian.name, units, ranks, allocator=Lagrangian.name)
    return replace(result, grids={member.name: each.grid for unit, each in chosen.items() if each.grid for member in unit.members})


def _choices(problem: AllocationProblem, unit: Unit, rounding: Mapping[str, npt.NDArray[np.float64]], itemsize: int) -> Iterator[_Choice]:
    """Yield every rank and the dense matrices, in floats and on each grid; what shall stay dense has no ranks."""
    curve, weight = problem.known_curves(Lagrangian.name)[unit.name], problem.weights.get(unit.name, 1.0)
    singles = {other.name for other in problem.units if len(other.members) == 1}
    alone = len(unit.members) > 1 and all(member.name in singles for member in unit.members)  # then they stay dense one by one
    dense = any(member.name in problem.keep_dense for member in unit.members)
    ranks = [] if dense else list(range(1, unit.break_even_rank + 1))
    for name in ("", *rounding):
        grid, added = GRIDS.get(name), rounding.get(name)
        for rank in ranks:
            error = float(curve[rank]) + (0.0 if added is None else float(added[rank - 1]))
            yield _Choice(unit.bytes(rank, itemsize, grid), weight * error, rank, name)
        if not alone:
            yield _Choice(unit.bytes(None, itemsize, grid), 0.0 if added is None else weight * float(added[-1]), None, name)


def _worthwhile(choices: Iterator[_Choice]) -> list[_Choice]:
    """Return the choices that err less than every cheaper one, the cheapest first."""
    result: list[_Choice] = []
    for choice in sorted(choices, key=lambda each: (each.cost, each.error)):
        if not result or choice.error < result[-1].error:
            result.append(choice)
    return result


def stored_bytes_of(allocation: RankAllocation, units: tuple[Unit, ...], itemsize: int) -> int:
    """Return the bytes of the compressible layers under an allocation with grids."""
    used = [unit for unit in units if unit.name in allocation.ranks]
    return sum(
        unit.bytes(allocation.ranks[unit.name], itemsize, GRIDS.get(allocation.grids.get(unit.members[0].name, ""))) for unit in used
    )


def chosen_words(allocation: RankAllocation) -> dict[str, str]:
    """Return unit -> its choice in words: ``rank 20, int8``, ``dense, floats``."""
    return {
        name: f"{'dense' if rank is None else f'rank {rank}'}, {allocation.grids.get(name.partition('+')[0], 'floats')}"
        for name, rank in allocation.ranks.items()
    }

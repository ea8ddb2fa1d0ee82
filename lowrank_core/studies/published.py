"""The search of Bolaco (arXiv 2405.10616) as its published code runs it: which points there are, and with which it begins. Torch-free.

A point is a vector k of nominal kept fractions, one for each type (q and k together), and it may be measured only if

    (κ - 0.1)·S ≤ round(Σ_i s_i k_i, 4) ≤ κ·S,    κ = 1 - compression ratio,  S = Σ_i s_i,

with s_i the parameters of a type in a block, in squares of the model's width (LLaMA-7B: S = 12.0625); what stays dense has k = 1. That
is asked of the fractions, before ranks are whole and cut to eights, and it costs no measurement: points are drawn until enough meet it.
How the next point is proposed is in ``search.improvement``, on which windows it is measured in ``search.selection``.

Departures, where the code knows LLaMA at 20 and 30 % alone: its first point is (.5, .5, κ, κ, κ) for q and k, o, gate, up, down. Here
attention has .5 and everything else κ, whatever types a model has; where that misses the budget, it is scaled until it meets it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lowrank_core.allocation import module_group
from lowrank_core.errors import BudgetError
from lowrank_core.parameters import Unit

__all__ = [
    "ALLOCATIONS",
    "MIN",
    "MARGIN",
    "MAX",
    "POOL_RATIO",
    "RULES",
    "PublishedScheme",
    "published_rank",
]

RULES = "bolaco 2"
"""Of the objective ``bolaco`` and of a search as published; a study says by which its trials were measured (none: by those before)."""

MIN, MAX = 0.2, 1.001
"""Bounds of a kept fraction; from 1 on a matrix is dense."""
MARGIN = 0.1
"""Fraction of the parameters that a point may remove beyond the ratio."""

_HALF = 0.5  # of q, k and o in the first point
_DIGITS = 4
_CANDIDATES = 100  # the initial points are chosen among so many draws

ALLOCATIONS, POOL_RATIO = 20, 8.2
"""At how many random points windows are looked at, and how many windows for each that is selected: 820 for 100."""

_CHUNK, _MAX_CHUNKS = 2**16, 128
_STEPS = 60  # of a bisection: exact in float64

Points = npt.NDArray[np.float64]


def published_rank(unit: Unit, kept: float) -> int:
    """Return ⌈r⌉ for the r at which ``unit`` stores ``kept`` of its weights: k·m·n/(m + n) as plain factors, the published code's.

    Pivoted, r(m + n - r) = k·m·n; the published code has no such storage.
    """
    rows, columns = unit.d_out, unit.d_in
    exact = kept * rows * columns / (rows + columns)
    if unit.storage == "pivoted":
        exact = 2 * kept * rows * columns / (rows + columns + math.sqrt((rows + columns) ** 2 - 4 * kept * rows * columns))
    return min(unit.max_rank, math.ceil(exact))


@dataclass(frozen=True)
class PublishedScheme:
    """The points of a search as published.

    Attributes:
        groups: names of the variables.
        sizes: of each, parameters in a block, in squares of the model's width.
        dense: the same of what is no variable.
        attention: whether a group is of the attention, the value projections left out.
        compression_ratio: fraction of the parameters to remove.
    """

    groups: tuple[str, ...]
    sizes: tuple[float, ...]
    dense: float
    attention: tuple[bool, ...]
    compression_ratio: float

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[Unit]], dense: Sequence[Unit], compression_ratio: float) -> PublishedScheme:
        """Return the scheme for groups of units; ``dense`` are the units without a variable.

        Raises:
            BudgetError: no point meets the budget.
        """
        everything = [*(unit for units in groups.values() for unit in units), *dense]
        blocks = 1 + max(unit.depth for unit in everything)
        square = everything[0].d_in ** 2 * blocks

        def size(units: Sequence[Unit]) -> float:
            return sum(unit.d_out * unit.d_in for unit in units) / square

        attention = tuple(_is_attention(units[0]) for units in groups.values())
        scheme = cls(tuple(groups), tuple(size(units) for units in groups.values()), size(dense), attention, compression_ratio)
        scheme._check_reachable()
        return scheme

    @property
    def total(self) -> float:
        """S: the parameters of a block, in squares of the model's width."""
        return self.dense + sum(self.sizes)

    def kept(self, points: Points) -> Points:
        """Return Σ s_i k_i of each of ``points`` (..., groups), what stays dense included, to four digits (...)."""
        result: Points = np.round(points @ np.asarray(self.sizes) + self.dense, _DIGITS)
        return result

    def meets(self, points: Points) -> npt.NDArray[np.bool_]:
        """Return which of ``points`` (..., groups) may be measured (...)."""
        kept, share = self.kept(points), 1 - self.compression_ratio
        result: npt.NDArray[np.bool_] = (kept <= share * self.total) & (kept >= (share - MARGIN) * self.total)
        return result

    def _check_reachable(self) -> None:
        minimum = self.dense + MIN * sum(self.sizes)
        if round(minimum, _DIGITS) > (1 - self.compression_ratio) * self.total:
            raise BudgetError(
                f"compression ratio {self.compression_ratio:g} can't be met: kept fractions of {MIN:g} everywhere, the least that the "
                f"published search draws, remove only {1 - minimum / self.total:.3f}. Lower it, or compress the value projections too."
            )

    def draw(self, generator: np.random.Generator, count: int) -> Points:
        """Return ``count`` points (count, groups), uniform among those that meet the budget; fewer if eight million draws give fewer.

        Raises:
            BudgetError: so many draws gave none.
        """
        result: list[Points] = []
        missing = count
        for _ in range(_MAX_CHUNKS):
            drawn = generator.uniform(MIN, MAX, (_CHUNK, len(self.groups)))
            result.append(drawn[self.meets(drawn)][:missing])
            missing -= len(result[-1])
            if not missing:
                break
        if missing == count:
            raise BudgetError(
                f"none of {_CHUNK * _MAX_CHUNKS:,} random points of the published search removes between {self.compression_ratio:g} and "
                f"{self.compression_ratio + MARGIN:g} of the parameters. Change the ratio, or take a search whose points are projected."
            )
        return np.concatenate(result)

    @cached_property
    def first(self) -> Points:
        """The point that the search begins at (groups,): .5 for attention, κ for the rest; scaled where that misses the budget."""
        wanted = np.where(self.attention, _HALF, np.clip(1 - self.compression_ratio, MIN, 1.0))
        if self.meets(wanted):
            return wanted
        budget = (1 - self.compression_ratio) * self.total - 10.0**-_DIGITS  # whatever the rounding
        low, high = 0.0, MAX / float(wanted.min())
        for _ in range(_STEPS):
            middle = (low + high) / 2
            spent = self.kept(np.clip(middle * wanted, MIN, MAX))
            low, high = (middle, high) if spent <= budget else (low, middle)
        result: Points = np.clip(low * wanted, MIN, MAX)
        return result

    def initial(self, count: int, seed: int) -> Points:
        """Return the first ``count`` points (count, groups): ``first``, and of a hundred draws those that lie farthest.

        As in the published code each is the draw whose minimum distance to those chosen before is largest, in the unit cube.
        """
        draws = self.draw(np.random.default_rng([seed, 0]), _CANDIDATES)
        chosen = [self.first]
        nearest = np.linalg.norm(draws - self.first, axis=1)  # all variables have one range: the cube only scales distances
        for _ in range(min(count - 1, len(draws))):
            farthest = int(np.argmax(nearest))
            chosen.append(draws[farthest])
            nearest = np.minimum(nearest, np.linalg.norm(draws - draws[farthest], axis=1))
            nearest[farthest] = -1.0
        return np.stack(chosen)

    def point(self, values: Points) -> dict[str, float]:
        """Return ``values`` (groups,) by the names of the variables."""
        return dict(zip(self.groups, values.tolist(), strict=True))


def _is_attention(unit: Unit) -> bool:
    group, path = module_group(unit.kind), unit.members[0].name.lower()
    return group in ("qk", "o") or (group != "v" and any(word in path for word in ("attn", "attention")))

"""Ranks in the making: what a user changes manually, step by step, and can take back. Pure functions of frozen values.

Notation::

    row      a unit of the draft; every matrix is in exactly one
    k_u      kept fraction of a row, cost_u(r_u) / cost_u(dense); 1 for dense

A locked row is moved by nothing but its unlocking. Every other change goes the way of the allocators: a rank whose factors would cost
as much as the matrices is stored dense, and what is scaled never costs more than its budget, and less by under the cheapest step left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lowrank_core.allocation.base import RankAllocation, Ranks, allocation_from_ranks, round_down, units_by_name
from lowrank_core.allocation.problem import AllocationProblem
from lowrank_core.allocation.projection import project
from lowrank_core.errors import BudgetError, ConfigError, RankError
from lowrank_core.parameters import Unit, budget_for_ratio

__all__ = ["Draft", "DraftHistory", "began"]

_MAX_STEPS = 50
_MIN_KEPT = 1e-6


@dataclass(frozen=True)
class Draft:
    """Ranks of rows that cover every matrix once.

    Attributes:
        units: what the run's recipe gives ranks to, alternatives included.
        ranks: row -> rank, None where it stays dense; in the order of ``units``.
        locked: names of the rows that nothing moves.
        rank_multiple: ranks that are scaled are rounded down to a multiple of it, as the recipe asks.
    """

    units: tuple[Unit, ...]
    ranks: Ranks
    locked: frozenset[str] = frozenset()
    rank_multiple: int = 1

    @classmethod
    def of(cls, units: Sequence[Unit], ranks: Ranks, *, locked: Collection[str] = (), rank_multiple: int = 1) -> Draft:
        """Return a draft of ``ranks``; what they leave out stays dense.

        Raises:
            ConfigError: a name that is no unit, or a matrix in two compressed ones.
            RankError: a rank outside its limits.
        """
        result = allocation_from_ranks("", units, ranks).ranks
        rows = _cover(units, [name for name, rank in result.items() if rank is not None], list(result))
        kept = {name: result.get(name) for name in rows}
        return cls(tuple(units), kept, frozenset(locked).intersection(kept), rank_multiple)

    @cached_property
    def _known(self) -> Mapping[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @cached_property
    def rows(self) -> tuple[Unit, ...]:
        """The units in use, in the order of the model."""
        return tuple(self._known[name] for name in self.ranks)

    @cached_property
    def _rest(self) -> tuple[Unit, ...]:
        """Matrices that stay dense because none of their units fits next to the rows."""
        covered = {member.name for unit in self.rows for member in unit.members}
        members = {member.name: member for unit in self.units for member in unit.members}
        return tuple(Unit((member,)) for name, member in members.items() if name not in covered)

    @property
    def parameters(self) -> int:
        """Stored parameters of all matrices."""
        return sum(unit.parameters(self.ranks.get(unit.name)) for unit in (*self.rows, *self._rest))

    def kept(self, names: Collection[str]) -> float:
        """Return the fraction of their parameters that the rows ``names`` keep together; 1 without any."""
        rows = [self._known[name] for name in names if name in self.ranks]
        dense = sum(unit.dense_parameters for unit in rows)
        return sum(unit.parameters(self.ranks[unit.name]) for unit in rows) / dense if dense else 1.0

    def allocation(self, label: str) -> RankAllocation:
        return allocation_from_ranks(label, self.units, self.ranks, locked=self.locked)

    def to_json(self, label: str) -> str:
        """Return the text of an allocation file; ``locked`` is always there, as without it every rank would be."""
        return json.dumps(
            {**json.loads(self.allocation(label).to_json()), "locked": [name for name in self.ranks if name in self.locked]}, indent=1
        )

    def unit(self, name: str) -> Unit:
        """Return the row ``name``.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.ranks:
            units_by_name(self.units, [name])
            raise ConfigError(f"{name} is not compressed by itself here. Regroup its modules first.")
        return self._known[name]

    def with_rank(self, name: str, rank: int | None) -> Draft:
        """Return the draft with another rank of one row, None for dense.

        Raises:
            ConfigError: there is no such row.
            RankError: a rank outside its limits, or the row is locked.
        """
        unit = self.unit(name)
        kept = rank if unit.parameters(rank) < unit.dense_parameters else None
        if kept == self.ranks[name]:
            return self
        if name in self.locked:
            raise RankError(f"{name} is locked at {_words(self.ranks[name])}. Unlock it to change its rank.")
        return replace(self, ranks={**self.ranks, name: kept})

    def with_kept(self, name: str, kept: float) -> Draft:
        """Return the draft with the largest rank of one row that keeps at most the fraction ``kept`` of its parameters, at least 1.

        Raises:
            RankError: ``kept`` is not in [0, 1], or the row is locked.
        """
        if not 0 <= kept <= 1:
            raise RankError(f"{name}: the kept ratio must be between 0 and 100 %, got {100 * kept:g} %.")
        unit = self.unit(name)
        return self.with_rank(name, unit.rank_for_parameters(kept * unit.dense_parameters))

    def with_locks(self, names: Collection[str], *, locked: bool) -> Draft:
        """Return the draft with the rows ``names`` locked, or not."""
        chosen = self.locked.union(names) if locked else self.locked.difference(names)
        return replace(self, locked=chosen.intersection(self.ranks))

    def movable(self, names: Collection[str] | None = None) -> tuple[Unit, ...]:
        """Return the rows among ``names`` (None: all) that are not locked and that can be compressed at a gain."""
        among = self.ranks if names is None else set(names)
        return tuple(u for u in self.rows if u.name in among and u.name not in self.locked and u.break_even_rank > 0)

    def scaled(self, names: Collection[str], kept: float) -> Draft:
        """Return the draft in which the movable rows among ``names`` keep the fraction ``kept`` of their parameters together.

        Each keeps its proportion to the others, up to dense; rank 1 everywhere is the minimum.
        """
        free = self.movable(names)
        dense = sum(unit.dense_parameters for unit in free)
        if not free or math.floor(kept * dense) <= sum(unit.parameters(1) for unit in free):
            return self._moved({unit.name: 1 for unit in free})
        problem = AllocationProblem(free, 1 - min(1.0, kept))
        return self._moved(project(problem, self._proportions(free)))

    def fitted(self, compression_ratio: float) -> Draft:
        """Return the draft in which the movable rows, in proportion, spend what the others leave of the budget.

        Raises:
            BudgetError: nothing may move, or the locked rows alone are over the budget.
        """
        free = self.movable()
        budget = budget_for_ratio(self.units, compression_ratio)
        if not free and self.parameters != budget:
            over = self.parameters - budget
            raise BudgetError(
                f"every row is locked, and together they are {abs(over):,} parameters {'over' if over > 0 else 'under'} the budget. "
                "Unlock a row."
            )
        every = (*self.rows, *self._rest)
        moving = {unit.name for unit in free}
        stay = {unit.name: self.ranks.get(unit.name) for unit in every if unit.name not in moving}
        problem = AllocationProblem(every, compression_ratio, fixed=stay)
        return self._moved({n: r for n, r in project(problem, self._proportions(free)).items() if n not in stay})

    def _proportions(self, free: Sequence[Unit]) -> dict[str, float]:
        return {unit.name: max(_MIN_KEPT, self.kept([unit.name])) for unit in free}

    def _moved(self, ranks: Ranks) -> Draft:
        rounded = {name: None if rank is None else round_down(rank, self.rank_multiple) for name, rank in ranks.items()}
        return replace(self, ranks={**self.ranks, **rounded})

    def completed(self, allocation: RankAllocation) -> Draft:
        """Return the ranks that an allocator chose for the rows that are not locked; it may have grouped their modules otherwise.

        Raises:
            ConfigError: it moved a locked row.
        """
        moved = [name for name in self.locked if name not in allocation.ranks or allocation.ranks[name] != self.ranks[name]]
        if moved:
            raise ConfigError(f"{allocation.label} would move {sorted(moved)[0]}, which is locked.")
        return Draft.of(self.units, allocation.ranks, locked=self.locked, rank_multiple=self.rank_multiple)

    def alternatives(self, module: str) -> tuple[Unit, ...]:
        """Return the units that hold the matrix ``module``: alone, in a stack, by heads."""
        return tuple(unit for unit in self.units if any(member.name == module for member in unit.members))

    def regrouped(self, name: str) -> Draft:
        """Return the draft with the unit ``name`` as a row; what shared a row with its matrices stands by itself again.

        Every matrix keeps about the fraction that it kept before.

        Raises:
            ConfigError: there is no such unit.
            RankError: one of the rows that it takes apart is locked.
        """
        unit = units_by_name(self.units, [name])[name]
        if name in self.ranks:
            return self
        wanted = {member.name for member in unit.members}
        apart = [row for row in self.rows if wanted & {member.name for member in row.members}]
        for row in apart:
            if row.name in self.locked:
                raise RankError(f"{row.name} is locked, and would be taken apart. Unlock it first.")
        share = {member.name: self.kept([row.name]) for row in (*self.rows, *self._rest) for member in row.members}
        rows = _cover(self.units, [name, *(row for row in self.ranks if self._known[row] not in apart)], [])
        ranks = {row: self.ranks[row] if row in self.ranks else _rank_keeping(self._known[row], share) for row in rows}
        return replace(self, ranks=ranks)


def _rank_keeping(unit: Unit, share: Mapping[str, float]) -> int | None:
    return unit.rank_for_parameters(sum(share[member.name] * member.dense_parameters for member in unit.members))


def _words(rank: int | None) -> str:
    return "dense" if rank is None else f"rank {rank}"


def _cover(units: Sequence[Unit], chosen: Sequence[str], wished: Sequence[str]) -> tuple[str, ...]:
    """Return names of units, in their order, that hold every matrix once: ``chosen``, then ``wished`` where they fit, then the smallest."""
    known = {unit.name: unit for unit in units}
    smallest = [unit.name for unit in sorted(units, key=lambda unit: len(unit.members))]
    taken: set[str] = set()
    rows: set[str] = set()
    for name in [*chosen, *wished, *smallest]:
        names = {member.name for member in known[name].members}
        if not names & taken:
            rows.add(name)
            taken |= names
    return tuple(unit.name for unit in units if unit.name in rows)


@dataclass(frozen=True)
class DraftHistory:
    """A draft with the steps that led to it.

    Attributes:
        start: what it began from.
        present: as it is.
        past, future: the drafts before it, the oldest first, and those that were taken back, the next first.
        gesture: what the last step was a part of, e.g. the drag of a slider: all its values are one step.
    """

    start: Draft
    present: Draft
    past: tuple[Draft, ...] = ()
    future: tuple[Draft, ...] = field(default=())
    gesture: str = ""

    def edited(self, change: Callable[[Draft], Draft], *, gesture: str = "") -> DraftHistory:
        """Return the history after ``change``; a further step of one gesture starts where the gesture did.

        Raises:
            LowRankError: as ``change``.
        """
        goes_on = bool(gesture and gesture == self.gesture and self.past)
        base = self.past[-1] if goes_on else self.present
        draft = change(base)
        if draft == self.present:
            return self
        past = self.past if goes_on else (*self.past, self.present)
        return DraftHistory(self.start, draft, past[-_MAX_STEPS:], (), gesture)

    def undone(self) -> DraftHistory:
        if not self.past:
            return self
        return DraftHistory(self.start, self.past[-1], self.past[:-1], (self.present, *self.future))

    def redone(self) -> DraftHistory:
        if not self.future:
            return self
        return DraftHistory(self.start, self.future[0], (*self.past, self.present), self.future[1:])

    def started(self, draft: Draft) -> DraftHistory:
        """Return the history with another beginning, as a step that can be taken back."""
        return replace(self.edited(lambda _: draft), start=draft)

    def reset(self) -> DraftHistory:
        """Return to the beginning, as a step that can be taken back."""
        return self.edited(lambda _: self.start)


def began(draft: Draft) -> DraftHistory:
    """Return the history of a draft that nobody has changed yet."""
    return DraftHistory(draft, draft)

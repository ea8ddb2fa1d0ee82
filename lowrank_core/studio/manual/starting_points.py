"""Starting points of a rank draft: a rule, a trial, a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.allocation import ALLOCATORS, RULES, Draft, parse_allocation
from lowrank_core.allocation.curves import CurveRecord
from lowrank_core.allocation.units import dense_layers, value_layers
from lowrank_core.config import SearchConfig
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import Unit
from lowrank_core.studies.records import TrialRecord, best_trial
from lowrank_core.studies.space import SearchSpace
from lowrank_core.studio.shared.formatting import number, percent
from lowrank_core.studio.shared.trial_names import trial_label

__all__ = ["Recipe", "first_draft", "missing_rules", "rules", "starts"]

Start = int | str
"""A trial's number, or an allocator's name."""


@dataclass(frozen=True)
class Recipe:
    """Shared data of a run's drafts: units, recipe, error curves."""

    units: tuple[Unit, ...]
    search: SearchConfig
    record: CurveRecord | None

    @property
    def dense_rows(self) -> tuple[str, ...]:
        """Rows that the recipe keeps dense; locked in a new draft."""
        return _value_rows(self.units) if self.search.compression.value_dense else ()

    def draft(self, trial: TrialRecord) -> Draft:
        """Return the ranks of ``trial``.

        Raises:
            ConfigError, RankError: they do not fit the model.
        """
        return Draft.of(self.units, trial.ranks, locked=self.dense_rows, rank_multiple=self._multiple)

    def ruled(self, name: str, compression_ratio: float) -> Draft:
        """Return the allocation of ``name`` at ``compression_ratio``.

        Raises:
            ConfigError: it lacks what it works from.
            BudgetError: the ratio can't be met.
        """
        return self.refitted(Draft.of(self.units, {}, locked=self.dense_rows, rank_multiple=self._multiple), name, compression_ratio)

    def refitted(self, draft: Draft, name: str, compression_ratio: float) -> Draft:
        """Return ``draft`` with the allocator's ranks for all rows that are not locked.

        Raises:
            as ``ruled``.
        """
        dense = dense_layers(self.units, self.search.compression)
        space = SearchSpace(
            self.units, compression_ratio, dense, rank_multiple=self._multiple, curves=self.record.curves if self.record else None
        )
        fixed = {row: draft.ranks[row] for row in draft.ranks if row in draft.locked}
        influence = self.record.influence if self.record else ()
        return draft.completed(space.by_allocator(name, compression_ratio, fixed=fixed, influence=influence))

    def from_file(self, content: bytes, name: str) -> Draft:
        """Return the ranks and locks of an allocation file.

        Raises:
            ConfigError: it is no allocation file, or it names what is no unit of this run.
            RankError: a rank outside its limits.
        """
        try:
            given = parse_allocation(content.decode("utf-8"), name)
        except UnicodeDecodeError as error:
            raise ConfigError(f"ranks: {name} is not UTF-8 text. Give an allocation file, as “Allocation (JSON)” writes it.") from error
        return Draft.of(self.units, given.ranks, locked=given.locked, rank_multiple=self._multiple)

    @property
    def _multiple(self) -> int:
        return self.search.compression.rank_multiple


def _value_rows(units: Sequence[Unit]) -> tuple[str, ...]:
    values = set(value_layers([member for unit in units for member in unit.members]))
    return tuple(unit.name for unit in units if len(unit.members) == 1 and unit.members[0].name in values)


def rules(recipe: Recipe) -> dict[str, str]:
    """Return name -> label of the available allocators."""
    return {name: ALLOCATORS[name].label for name in RULES if not _lacks(name, recipe.record)}


def missing_rules(recipe: Recipe) -> list[str]:
    """Return the labels of allocators with missing inputs."""
    return [ALLOCATORS[name].label for name in RULES if _lacks(name, recipe.record)]


def _lacks(name: str, record: CurveRecord | None) -> bool:
    rule = ALLOCATORS[name]
    return (rule.needs_curves and record is None) or (rule.needs_influence and not (record and record.influence))


def starts(recipe: Recipe, trials: Sequence[TrialRecord], chosen: int | None) -> dict[Start, str]:
    """Return name -> label of all starting points: the best trial, the ``chosen`` one, rules, other trials, newest first."""
    usable = {trial.number: trial for trial in trials if trial.ranks}
    best = best_trial(trials) if recipe.search.max_ratio is None else None
    first = [number for number in (best.number if best else None, chosen) if number in usable]
    result: dict[Start, str] = {}
    for number_ in first:
        assert number_ is not None
        result[number_] = _trial_words(usable[number_], best)
    result |= {name: f"Rule: {label}" for name, label in rules(recipe).items()}
    result |= {number_: _trial_words(usable[number_], best) for number_ in sorted(usable, reverse=True) if number_ not in result}
    return result


def _trial_words(trial: TrialRecord, best: TrialRecord | None) -> str:
    words = [trial_label(trial), f"{percent(trial.compression_ratio)} removed" if trial.compression_ratio is not None else ""]
    words += [f"KL {number(trial.kl)}" if trial.kl is not None else trial.state]
    return ("Best: " if best is not None and trial.number == best.number else "") + ", ".join(filter(None, words))


def first_draft(recipe: Recipe, trials: Sequence[TrialRecord], chosen: int | None) -> tuple[Draft, str]:
    """Return the first draft and its name: the chosen trial, else the best, else the newest with ranks, else uniform ranks.

    Raises:
        BudgetError: the ratio of the run can't be met.
        ConfigError, RankError: a trial's ranks do not fit the model.
    """
    usable = [trial for trial in trials if trial.ranks]
    best = best_trial(trials) if recipe.search.max_ratio is None else None
    picked = next((trial for trial in usable if trial.number == chosen), best or next(reversed(usable), None))
    if picked is None:
        return recipe.ruled("uniform", recipe.search.compression_ratio), ALLOCATORS["uniform"].label
    return recipe.draft(picked), trial_label(picked)

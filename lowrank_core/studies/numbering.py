"""The place of a trial in its search: its number, had no worker ever been killed.

A trial that lost its worker is measured again as a new trial with a number of its own, and shifts the numbers of all that follow. What a
sampler draws must not depend on that: by their places, a search that was killed and resumed proposes the same points, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

__all__ = ["GIVEN", "RETRY_OF", "drawn_before", "place_of", "without_losses"]

GIVEN = "given"
"""User attribute of a trial whose ranks were given instead of drawn."""

RETRY_OF = "retry_of"
"""User attribute of a trial that measures again: the number of the one that lost its worker."""


def _retried(trial: FrozenTrial) -> int | None:
    """Return the number of the trial that this one repeats; in a database Optuna itself notes the first of a chain."""
    number = trial.user_attrs.get(RETRY_OF, trial.system_attrs.get("failed_trial"))
    return None if number is None else int(number)


def _places(trials: Sequence[FrozenTrial]) -> Mapping[int, int]:
    """Return number -> place: trials that are no repetitions are counted, and a repetition has the place of what it repeats."""
    result: dict[int, int] = {}
    first = 0
    for trial in sorted(trials, key=lambda trial: trial.number):
        retried = _retried(trial)
        if retried is not None and retried in result:
            result[trial.number] = result[retried]
        else:
            result[trial.number] = first
            first += 1
    return result


def place_of(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
    """Return the place of ``trial`` among all ``trials`` of its study."""
    return _places([*(other for other in trials if other.number < trial.number), trial])[trial.number]


def drawn_before(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
    """Return how many points were drawn in the places before ``trial``; what was enqueued with its point or its ranks was not drawn."""
    places = _places(trials)
    first = [other for other in trials if _retried(other) is None and places[other.number] < places[trial.number]]
    return sum("fixed_params" not in other.system_attrs and not other.user_attrs.get(GIVEN) for other in first)


def without_losses(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials as they would be, had none lost its worker: repetitions in the places of what they repeat, in order."""
    places = _places(trials)
    last = {places[trial.number]: trial for trial in sorted(trials, key=lambda trial: trial.number)}
    return [trial if trial.number == place else _at(trial, place) for place, trial in sorted(last.items())]


def _at(trial: FrozenTrial, place: int) -> FrozenTrial:
    moved = copy.copy(trial)
    moved.number = place
    return moved

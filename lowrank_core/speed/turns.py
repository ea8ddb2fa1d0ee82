"""Measuring things in turns: what disturbs the machine meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["in_turns"]

T = TypeVar("T")


def in_turns(actions: Sequence[Callable[[], T]], rounds: int) -> list[tuple[T, ...]]:
    """Return what the actions gave in each round, in their order; every second round runs them backwards.

    So nobody always goes first, when the machine is cool, or always finds the other's data in the caches.
    """
    results = []
    for turn in range(rounds):
        order = range(len(actions)) if turn % 2 == 0 else reversed(range(len(actions)))
        result = {index: actions[index]() for index in order}
        results.append(tuple(result[index] for index in range(len(actions))))
    return results

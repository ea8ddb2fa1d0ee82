"""Measuring things in turns: what disturbs the machine meets all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Spread", "in_turns"]

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        result = list(values)
        return cls(statistics.median(result), min(result), max(result))

    def to_mapping(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


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

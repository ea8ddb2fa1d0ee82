"""Two or more actions timed in turns, and a row of the table that says how they compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowrank_core.speed import Spread, in_turns

__all__ = ["TURNS", "SpeedRow", "compared", "seconds_in_turns"]

TURNS = 7
_SECONDS_OF_A_TURN = 0.02


@dataclass(frozen=True)
class SpeedRow:
    """Time of ``what`` over the time of ``against``, measured in turns.

    Attributes:
        ratio, low, high: median, smallest and largest of the ratios of the turns.
        expected: the ratio of their FLOPs; None where these are not counted.
        products: time of the matrix products of ``what`` alone over the time of ``against``; None where it has no other part.
        verdict: what this says, in words; empty where nothing is claimed.
    """

    what: str
    against: str
    detail: str
    ratio: float
    low: float
    high: float
    turns: int
    expected: float | None = None
    products: float | None = None
    verdict: str = ""


def _seconds(action: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def seconds_in_turns(*actions: Callable[[], object]) -> list[tuple[float, ...]]:
    """Return the seconds of each action, turn by turn; all run before to warm up, and in a turn as often as the last one needs."""
    for action in actions:
        _seconds(action, 1)
    repeats = max(1, round(_SECONDS_OF_A_TURN / max(_seconds(actions[-1], 1), 1e-6)))

    def timed(action: Callable[[], object]) -> Callable[[], float]:
        return lambda: _seconds(action, repeats)

    return in_turns([timed(action) for action in actions], TURNS)


def compared(what: str, action: Callable[[], object], against: str, other: Callable[[], object], detail: str) -> SpeedRow:
    """Run both in turns and compare."""
    ratio = Spread.of(ours / theirs for ours, theirs in seconds_in_turns(action, other))
    return SpeedRow(what, against, detail, ratio.median, ratio.low, ratio.high, TURNS)

"""Remaining time of a stage, from the steps of this session."""

from __future__ import annotations

from time import perf_counter

__all__ = ["Pace"]


class Pace:
    """Timer of a stage's steps, from the first reported one.

    What was done before it (blocks, steps or cells that an earlier session left) cost this session nothing, and the first step's own
    time is not known where some of it was. So there is no estimate before the second step. A stage that counts again (fewer steps, or
    another total) is timed again; so is one that has not moved since its first report: it waited for something else.
    """

    def __init__(self) -> None:
        self._first = self._total = -1
        self._last = -1
        self._began = 0.0

    def remaining(self, done: int, total: int) -> float | None:
        """Return the seconds until ``total`` steps are done; None before this session's first step."""
        now = perf_counter()
        if total != self._total or done < self._last or done == self._first:
            self._first, self._total, self._began = done, total, now
        self._last = done
        if done == self._first:
            return None
        return (now - self._began) / (done - self._first) * max(0, total - done)

"""Progress callbacks that end the work that they are given."""

from __future__ import annotations

from collections.abc import Callable

from lowrank_core.errors import Cancelled


def stopping_after(steps: int) -> Callable[[int, int], None]:
    """Return a callback that cancels once more than ``steps`` are done."""

    def progress(done: int, total: int) -> None:
        if done > steps:
            raise Cancelled

    return progress

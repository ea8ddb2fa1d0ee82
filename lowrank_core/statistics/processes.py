"""Calibration by several processes (``torchrun``): each runs its share of the windows, and their sums are merged as those of chunks are.

All processes see one store: the first writes there what has been merged, the others read it. Everything else is done by the first alone.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

import torch.distributed as dist

from lowrank_core.errors import ConfigError
from lowrank_core.text.windows import WindowSet

__all__ = ["agreed", "count", "end_helpers", "is_first", "merged", "share"]


class _Sums(Protocol):
    def merge(self, other: Self) -> None: ...


T = TypeVar("T")
S = TypeVar("S", bound=_Sums)


def count() -> int:
    """Return how many processes calibrate together: 1 unless ``torch.distributed`` was set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return count() == 1 or dist.get_rank() == 0


def share(windows: WindowSet, multiple: int) -> tuple[int, WindowSet]:
    """Return where this process's part of the windows begins, and that part: whole groups of ``multiple`` windows, in order.

    Where those are whole batches, every pass is one that a single process would make, and nothing but the order of sums differs.

    Raises:
        ConfigError: there are fewer groups than processes.
    """
    if count() == 1:
        return 0, windows
    groups = -(-windows.windows // multiple)
    if groups < count():
        raise ConfigError(f"{windows.windows} windows in groups of {multiple} don't give each of {count()} processes one. Start fewer.")
    start, stop = (groups * rank // count() * multiple for rank in (dist.get_rank(), dist.get_rank() + 1))
    return start, windows.part(start, stop)


def merged(mine: S) -> S:
    """Return the sums of all processes in the first one, in the order of their windows; in the others their own."""
    if count() == 1:
        return mine
    parts: list[S | None] | None = [None] * count() if is_first() else None
    dist.gather_object(mine, parts)
    for later in parts[1:] if parts is not None else ():
        assert later is not None
        mine.merge(later)
    return mine


def agreed(value: T) -> T:
    """Return what the first process gave."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def end_helpers() -> None:
    """End all processes but the first, once everything that they help with is done."""
    if not is_first():
        raise SystemExit(0)

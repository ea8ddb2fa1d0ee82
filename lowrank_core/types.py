"""Types that many modules share. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt

__all__ = ["Progress", "Result", "Stage", "Vector", "silent"]

Progress = Callable[[int, int], None]
"""Called with the numbers of finished and of all steps; an exception that it raises ends the work."""

Stage = Callable[[str, int], AbstractContextManager[Progress | None]]
"""Is entered for a stage of work, given its name and how many steps it has (0: not known), and yields its progress."""

Result = dict[str, object]
"""Return value of a command, ready for JSON; ``text`` is what it prints without ``--json``."""

Vector = npt.NDArray[np.float64]


def silent(name: str, total: int = 0) -> AbstractContextManager[Progress | None]:
    """Report nothing of a stage."""
    return nullcontext()

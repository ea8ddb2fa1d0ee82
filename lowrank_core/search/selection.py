"""Windows of a published search: those whose perplexity varies most over random allocations.

As the published code does it once for its validation text: the perplexity of every window at 20 random points that meet the budget, and
the 100 windows (of some 820) of the largest standard deviation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.config import SearchConfig
from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import score_windows
from lowrank_core.studies.published import ALLOCATIONS, POOL_RATIO
from lowrank_core.studies.space import SearchSpace
from lowrank_core.text import WindowSet
from lowrank_core.types import Progress

__all__ = ["Selection", "most_varied", "select_windows"]

_SEED = 42
"""One draw for all seeds of a search, as in the published code."""


@dataclass(frozen=True)
class Selection:
    """Windows of a pool.

    Attributes:
        key: of the pool, the model's factors and the points that were looked at.
        pool: windows that there were to choose from.
        chosen: their places, in the order of the text.
        wanted: windows that were asked for.
    """

    key: str
    pool: int
    chosen: tuple[int, ...]
    wanted: int

    def of(self, pool: WindowSet) -> WindowSet:
        """Return the chosen windows of ``pool``."""
        words = f"the {len(self.chosen)} of {self.pool} whose perplexity varies most over {ALLOCATIONS} random allocations"
        return replace(pool, ids=pool.ids[list(self.chosen)], selection="" if len(self.chosen) == self.pool else words)

    def warning(self) -> str:
        """Return a warning if there were fewer windows than in the published code; else empty."""
        if len(self.chosen) < self.wanted or self.pool == self.wanted:
            return (
                f"The validation split has {self.pool} windows and {self.wanted} were to be selected: trials see all of them. "
                "Give a longer text, or a shorter context."
            )
        if self.pool < round(POOL_RATIO * self.wanted) * 0.95:
            return (
                f"{self.wanted} validation windows were selected from {self.pool}, all that the text has; the published code selects "
                f"from {POOL_RATIO:g} times as many."
            )
        return ""


def most_varied(perplexities: npt.NDArray[np.float64], count: int) -> tuple[int, ...]:
    """Return the ``count`` columns of (allocations, windows) of the largest standard deviation, in order; the first of equals."""
    order = np.argsort(-perplexities.std(axis=0), kind="stable")[:count]
    return tuple(sorted(order.tolist()))


def select_windows(
    decomposed: Decomposed,
    pool: WindowSet,
    space: SearchSpace,
    config: SearchConfig,
    *,
    batch_size: int,
    known: Selection | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Return the windows of ``pool`` for trials; ``known`` is reused if it matches.

    Raises:
        BudgetError: no point meets the budget.
        NumericalError: the model diverged at all random points but one.
    """
    scheme, wanted = space.scheme, config.selected_windows
    assert scheme is not None
    points = scheme.draw(np.random.default_rng(_SEED), ALLOCATIONS)
    key = _key(decomposed, pool, points, wanted)
    if known is not None and known.key == key:
        return known
    if pool.windows <= wanted:
        return Selection(key, pool.windows, tuple(range(pool.windows)), wanted)
    rows = []
    for done, point in enumerate(points, start=1):
        ranks = space.allocation(scheme.point(point)).ranks
        try:
            with decomposed.swapped(ranks):
                scores, _ = score_windows(decomposed.handle, pool, batch_size=batch_size, autocast=config.autocast)
            rows.append(torch.exp(scores.nll.double()).numpy())
        except NumericalError:
            pass  # a window's spread over the others still tells
        if progress is not None:
            progress(done, len(points))
    if len(rows) < 2:
        raise NumericalError("the compressed model diverged at the random points that select windows. Lower the compression ratio.")
    return Selection(key, pool.windows, most_varied(np.stack(rows), wanted), wanted)


def _key(decomposed: Decomposed, pool: WindowSet, points: npt.NDArray[np.float64], wanted: int) -> str:
    parts = (decomposed.handle.fingerprint, json.dumps(asdict(decomposed.config), sort_keys=True), pool.sha256, str(wanted))
    return hashlib.sha256("\n".join(parts).encode() + points.tobytes()).hexdigest()[:32]

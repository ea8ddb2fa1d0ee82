"""Metrics by the position in the context."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lowrank_core.evaluation.tokens import TokenScores

__all__ = ["PositionRow", "position_rows"]


@dataclass(frozen=True)
class PositionRow:
    """Means over the tokens predicted after ``first`` to ``last`` tokens of context (BOS counts); divergences in nats.

    Attributes:
        first, last: positions, both included; rows double: 1, 2-3, 4-7, and so on to the context - 1.
        tokens: how many were scored there.
        nll: of the model; ``dense_nll``, ``kl`` and ``top1_agreement`` only next to a dense one.
    """

    first: int
    last: int
    tokens: int
    nll: float
    dense_nll: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_mapping(self) -> dict[str, object]:
        """Return the row ready for JSON, without what needs a dense model if there was none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def position_rows(tokens: TokenScores, scored: Tensor | None = None) -> tuple[PositionRow, ...]:
    """Return the means of every range of positions that has scored tokens.

    Args:
        tokens: (windows, T - 1); the first column was predicted from one token.
        scored: (windows, T - 1), which of them count; None for all.
    """
    mask = torch.ones_like(tokens.nll, dtype=torch.bool) if scored is None else scored
    rows = (_row(tokens, mask, first, min(2 * first, mask.shape[1] + 1)) for first in _firsts(mask.shape[1]))
    return tuple(row for row in rows if row is not None)


def _firsts(last: int) -> list[int]:
    return [1 << power for power in range(last.bit_length())]


def _row(tokens: TokenScores, scored: Tensor, first: int, end: int) -> PositionRow | None:
    """Return the row of positions ``first`` to ``end`` - 1, or None if none is scored."""
    chosen = scored[:, first - 1 : end - 1]
    count = int(chosen.sum())
    if count == 0:
        return None
    names = ("nll", "dense_nll", "kl", "top1_agreement")
    columns = {name: tokens.columns[name] for name in names if name in tokens.columns}
    return PositionRow(
        first, end - 1, count, **{name: float(column[:, first - 1 : end - 1][chosen].mean()) for name, column in columns.items()}
    )

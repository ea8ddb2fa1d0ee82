"""Block influence of ShortGPT, arXiv 2403.03853: change of the hidden states by a block.

Notation::

    x, x'   hidden state (d,) of a token before and after a block
    BI      1 - E[cos(x, x')] over tokens, in [0, 2]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_core.errors import NumericalError
from lowrank_core.models.blocks import hidden_after, hidden_before

__all__ = ["InfluenceAccumulator"]


class InfluenceAccumulator:
    """Streams BI of one block, in float64: what the block is given and what it returns is seen by hooks.

    Attributes:
        name: dotted path of the block.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._before: Tensor | None = None
        self._total: Tensor | None = None
        self._tokens = 0

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """See what ``block`` is given and returns; the hooks are gone afterwards whatever happens."""

        def keep(_: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> None:
            before = hidden_before(arguments, options)
            self._before = None if before is None else before.clone()  # a block may add to it in place

        def compare(_: nn.Module, arguments: tuple[object, ...], output: object) -> None:
            before, after = self._before, hidden_after(output, self._before)
            if before is not None and after is not None:
                self._update(before, after)
            self._before = None

        hooks = (block.register_forward_pre_hook(keep, with_kwargs=True), block.register_forward_hook(compare))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _update(self, before: Tensor, after: Tensor) -> None:
        """Count hidden states (B, …, d)."""
        for x, y in zip(before, after, strict=True):  # window by window: float64 takes twice the room, or four times
            total = (1 - _cosines(x.to(torch.float64), y.to(torch.float64))).sum()
            self._total = total if self._total is None else self._total + total
        self._tokens += before[..., 0].numel()

    def merge(self, other: InfluenceAccumulator) -> None:
        """Add everything that ``other`` has seen."""
        if other._total is not None:
            self._total = other._total if self._total is None else self._total + other._total
            self._tokens += other._tokens

    def finish(self) -> float | None:
        """Return BI; None for a block that neither was given nor returned hidden states.

        Raises:
            NumericalError: a hidden state holds NaN or Inf; names the block.
        """
        if self._total is None:
            return None
        mean = float(self._total) / self._tokens
        if mean != mean:
            raise NumericalError(f"{self.name}: its hidden states hold NaN or Inf. Run the model in float32, or check the checkpoint.")
        return max(0.0, mean)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row; 0 where one of the two is zero."""
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    cosines: Tensor = torch.linalg.vecdot(x, y) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    return cosines

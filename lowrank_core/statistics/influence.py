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

from lowrank_core.errors import ModelError, NumericalError

__all__ = ["InfluenceAccumulator"]


class InfluenceAccumulator:
    """Streams BI of one block, in float64: what the block is given is seen by a hook, what it returns is handed in."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: Tensor | None = None
        self._total: Tensor | None = None
        self._tokens = 0

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """See what ``block`` is given; the hook is gone afterwards whatever happens."""

        def keep(_: nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> None:
            before = arguments[0] if arguments else options.get("hidden_states")
            if not isinstance(before, Tensor):
                raise ModelError(f"{self._name} is not given hidden states, so the model can't be run block by block.")
            self._before = before.clone()  # a block may add to it in place

        hook = block.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def update(self, after: Tensor) -> None:
        """Count the hidden states (B, T, d) that the block made of those it was last given."""
        assert self._before is not None
        for x, y in zip(self._before, after, strict=True):  # window by window: float64 takes twice the room, or four times
            total = (1 - _cosines(x.to(torch.float64), y.to(torch.float64))).sum()
            self._total = total if self._total is None else self._total + total
            self._tokens += len(x)
        self._before = None

    def finish(self) -> float:
        """Return BI.

        Raises:
            NumericalError: a hidden state holds NaN or Inf; names the block.
        """
        assert self._total is not None
        mean = float(self._total) / self._tokens
        if mean != mean:
            raise NumericalError(f"{self._name}: its hidden states hold NaN or Inf. Run the model in float32, or check the checkpoint.")
        return max(0.0, mean)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of each row; 0 where one of the two is zero."""
    norms = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    cosines: Tensor = torch.linalg.vecdot(x, y) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    return cosines

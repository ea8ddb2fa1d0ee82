"""Running a model one decoder block at a time, masks and rotary embeddings coming from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_core.errors import ModelError
from lowrank_core.models.handle import ModelHandle, blocks_of

__all__ = ["BlockRunner"]


class _Captured(Exception):
    """Ends a forward pass whose wanted block is done."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


class BlockRunner:
    """Runs single blocks of a model on stored hidden states.

    For block b the model is called with its tokens; the blocks before b hand on the stored hidden states, and once b is done the pass is
    cut short. Nothing here knows an architecture, and chained blocks give the bits of the whole pass. Blocks may hold replaced layers.

    Attributes:
        names: dotted path of each block.
    """

    def __init__(self, handle: ModelHandle) -> None:
        prefix, blocks = blocks_of(handle.module)
        self._handle = handle
        self._blocks = tuple(blocks)
        self._tuple_lengths: dict[int, int] = {}
        self.names = tuple(f"{prefix}.{index}" for index in range(len(self._blocks)))

    def run(self, index: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the hidden states (B, T, d) after block ``index``, in the model's own dtype and on its device.

        Hooks that the caller has on layers of that block see their inputs and outputs; gradients are recorded as the caller set it.

        Args:
            index: of the block, from 0.
            ids: tokens (B, T) of the windows.
            hidden: hidden states (B, T, d) after the block before; None for block 0. They are not changed.

        Raises:
            ModelError: the blocks pass on more than hidden states, or the model does not reach this one.
        """
        with self.beginning_at(index, hidden):
            output = self._pass_until(index, ids)
        return self._hidden_of(index, output)

    @contextmanager
    def beginning_at(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Let one pass of the model begin at block ``index``: the blocks before it hand on ``hidden``, of the same tokens.

        Arguments and errors are those of ``run``.
        """
        assert (hidden is None) == (index == 0)
        if hidden is not None:
            if index - 1 not in self._tuple_lengths:
                self._learn_form(index - 1)
            hidden = hidden.to(self._handle.device, copy=True)
        with self._skipping(index, hidden):
            yield

    def _learn_form(self, index: int) -> None:
        """See what block ``index`` returns, from two tokens."""
        with torch.no_grad():
            self._hidden_of(index, self._pass_until(index, torch.tensor([[0, 1]])))

    def _pass_until(self, index: int, ids: Tensor) -> object:
        def stop(module: nn.Module, arguments: object, output: object) -> None:
            raise _Captured(output)

        hook = self._blocks[index].register_forward_hook(stop)
        try:
            self._handle.module.base_model(input_ids=ids.to(self._handle.device), use_cache=False)
        except _Captured as captured:
            return captured.output
        finally:
            hook.remove()
        raise ModelError(f"{self._handle.reference}: {self.names[index]} is never run, so the model can't be run block by block.")

    def _hidden_of(self, index: int, output: object) -> Tensor:
        """Return the hidden states in a block's output, and remember its form."""
        parts = output if isinstance(output, tuple) else (output,)
        if not parts or not isinstance(parts[0], Tensor) or any(part is not None for part in parts[1:]):
            raise ModelError(
                f"{self._handle.reference}: {self.names[index]} passes on more than hidden states, "
                "so the model can't be run block by block."
            )
        self._tuple_lengths[index] = len(parts) if isinstance(output, tuple) else 0
        return parts[0]

    @contextmanager
    def _skipping(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Let the blocks before ``index`` return ``hidden`` in their own form."""
        skipped = self._blocks[:index]
        before = [block.__dict__.get("forward") for block in skipped]
        try:
            for position, block in enumerate(skipped):
                length = self._tuple_lengths.get(position, self._tuple_lengths[index - 1])
                block.forward = _returning((hidden, *[None] * (length - 1)) if length else hidden)
            yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward


def _returning(output: object) -> Callable[..., object]:
    def forward(*arguments: object, **options: object) -> object:
        return output

    return forward

"""Running a model one decoder block at a time, masks and rotary embeddings coming from the model itself.

Not every decoder is a chain: keys and values may be shared between blocks, or a state may pass by them. So the chain is tried when a
runner is made, on two short windows: if its bits are not those of the whole pass, the model is run by whole passes, which are slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_core.errors import ModelError
from lowrank_core.models.handle import ModelHandle, blocks_of, random_tokens

__all__ = ["BlockRunner", "hidden_after", "hidden_before"]

_PROBE_TOKENS = 16


def hidden_before(arguments: tuple[object, ...], options: Mapping[str, object]) -> Tensor | None:
    """Return the hidden states that a block is given: the first tensor among its arguments, which may be in what a block returned."""
    values = (part for value in (*arguments, *options.values()) for part in _parts(value))
    return next((value for value in values if isinstance(value, Tensor)), None)


def hidden_after(output: object, given: Tensor | None) -> Tensor | None:
    """Return the hidden states in a block's output: the first tensor of the shape of those that it was given; None if there is none."""
    tensors = (part for part in _parts(output) if isinstance(part, Tensor))
    return None if given is None else next((part for part in tensors if part.shape == given.shape), None)


def _parts(output: object) -> tuple[object, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


class _Captured(Exception):
    """Ends a forward pass whose wanted block is done."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True)
class _Form:
    """Form of a block's output: a tensor, or a tuple with the hidden states at ``position`` and parts that the next block doesn't need."""

    length: int | None
    position: int

    def wrap(self, hidden: Tensor) -> object:
        if self.length is None:
            return hidden
        return tuple(hidden if place == self.position else None for place in range(self.length))


@dataclass(frozen=True)
class _Call:
    """A block's call in a whole pass: its index, the form of its output, and the hidden states in it, where it has any."""

    block: int
    form: _Form
    hidden: Tensor | None


class BlockRunner:
    """Runs single blocks of a model on stored hidden states.

    For block b the model is called with its tokens; the blocks before b hand on the stored hidden states, and once b is done the pass is
    cut short. Nothing here knows an architecture. Blocks may hold replaced layers.

    Attributes:
        names: dotted path of each block.
        obstacle: why blocks can't be chained, in words; empty if they can: chained blocks then give the bits of the whole pass. Where
            there is one, every pass begins with the tokens (``hidden`` None).
    """

    def __init__(self, handle: ModelHandle) -> None:
        prefix, blocks = blocks_of(handle.module)
        self._handle = handle
        self._blocks = tuple(blocks)
        self.names = tuple(f"{prefix}.{index}" for index in range(len(self._blocks)))
        self._forms: tuple[_Form, ...] = ()
        self.obstacle = self._try_chain()

    @property
    def chained(self) -> bool:
        """Whether each block can be run on the hidden states after the block before it."""
        return not self.obstacle

    def run(self, index: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the hidden states (B, T, d) after block ``index``, in the model's own dtype and on its device.

        Hooks that the caller has on layers of that block see their inputs and outputs; gradients are recorded as the caller set it.

        Args:
            index: of the block, from 0.
            ids: tokens (B, T) of the windows.
            hidden: hidden states (B, T, d) after the block before, which are not changed; None to run the blocks before, too.

        Raises:
            ModelError: the model does not reach this block.
        """
        with self.beginning_at(index, hidden):
            parts = _parts(self._pass_until(index, ids))
        result = parts[self._forms[index].position if self._forms else 0]
        assert isinstance(result, Tensor)
        return result

    def run_all(self, ids: Tensor) -> None:
        """Run the whole decoder on tokens (B, T), for the hooks of the caller."""
        self._handle.module.base_model(input_ids=ids.to(self._handle.device), use_cache=False)

    @contextmanager
    def beginning_at(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Let one pass of the model begin at block ``index``: the blocks before it hand on ``hidden``, of the same tokens.

        Arguments are those of ``run``.
        """
        assert hidden is None or (self._forms and index > 0)
        if hidden is None:
            yield
            return
        with self._skipping(index, hidden.to(self._handle.device, copy=True)):
            yield

    def ends_in_logits(self, ids: Tensor) -> bool:
        """Whether the logits of tokens (B, T) follow from what the last block gives, and from the tokens, alone."""
        last = len(self._blocks) - 1
        hidden = None
        for index in range(last + 1):
            hidden = self.run(index, ids, hidden)
        expected = self._handle.module(input_ids=ids.to(self._handle.device), use_cache=False).logits
        with self.beginning_at(last + 1, hidden):
            result = self._handle.module(input_ids=ids.to(self._handle.device), use_cache=False).logits
        return _close(result, expected, self._tolerance)

    def _try_chain(self) -> str:
        """Return why the blocks are no chain, after learning their forms; empty if they are one."""
        windows = torch.split(random_tokens(self._handle.module, 2)[:, :_PROBE_TOKENS], 1)
        with torch.inference_mode():
            passes = [self._calls(ids) for ids in windows]
            self._tolerance = self._tolerance_of(passes[0], self._calls(windows[0]))
            if any([call.block for call in calls] != list(range(len(self._blocks))) for calls in passes):
                return "its blocks are not run once each, in their order"
            hidden = [[call.hidden for call in calls] for calls in passes]
            if any(state is None or state.shape[:-1] != windows[0].shape for states in hidden for state in states):
                return "its blocks pass on something else than a hidden state for each token"
            self._forms = tuple(call.form for call in passes[0])
            failed = self._first_difference(windows, hidden)
        self._forms = () if failed else self._forms
        return failed

    def _first_difference(self, windows: Sequence[Tensor], expected: Sequence[Sequence[Tensor | None]]) -> str:
        """Return in words where the chain leaves the whole passes, window by window at each block; empty if it does not.

        Two windows, because a block may read what a pass before it left behind: it has to be of other tokens.
        """
        hidden: list[Tensor | None] = [None] * len(windows)
        for index, name in enumerate(self.names):
            try:
                hidden = [self.run(index, ids, state) for ids, state in zip(windows, hidden, strict=True)]
            except Exception:  # a model that misses what a skipped block leaves behind may raise anything
                return f"{name} can't be run without the blocks before it"
            for state, states in zip(hidden, expected, strict=True):
                if not _close(state, states[index], self._tolerance):
                    return f"{name} gives something else without the blocks before it"
        return ""

    def _tolerance_of(self, calls: Sequence[_Call], again: Sequence[_Call]) -> float:
        """Return 0: bits are compared; half of the digits where the same pass gives other bits, as sums by atomics on a GPU do."""
        same = all(_close(one.hidden, other.hidden, 0.0) for one, other in zip(calls, again, strict=False))
        return 0.0 if same else math.sqrt(torch.finfo(self._handle.module.dtype).eps)

    def _calls(self, ids: Tensor) -> list[_Call]:
        """Return the calls of blocks in a whole pass, in their order."""
        calls: list[_Call] = []

        def hook_for(index: int) -> Callable[[nn.Module, tuple[object, ...], dict[str, object], object], None]:
            def hook(_: nn.Module, arguments: tuple[object, ...], options: dict[str, object], output: object) -> None:
                hidden, parts = hidden_after(output, hidden_before(arguments, options)), _parts(output)
                position = next((place for place, part in enumerate(parts) if part is hidden), 0)
                form = _Form(None if parts[0] is output else len(parts), position)
                calls.append(_Call(index, form, None if hidden is None else hidden.clone()))

            return hook

        hooks = [block.register_forward_hook(hook_for(index), with_kwargs=True) for index, block in enumerate(self._blocks)]
        try:
            self.run_all(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def _pass_until(self, index: int, ids: Tensor) -> object:
        def stop(module: nn.Module, arguments: object, output: object) -> None:
            raise _Captured(output)

        hook = self._blocks[index].register_forward_hook(stop)
        try:
            self.run_all(ids)
        except _Captured as captured:
            return captured.output
        finally:
            hook.remove()
        raise ModelError(f"{self._handle.reference}: {self.names[index]} is never run, so its layers can't be calibrated.")

    @contextmanager
    def _skipping(self, index: int, hidden: Tensor) -> Iterator[None]:
        """Let the blocks before ``index`` return ``hidden`` in their own form."""
        skipped = self._blocks[:index]
        before = [block.__dict__.get("forward") for block in skipped]
        try:
            for block, form in zip(skipped, self._forms, strict=False):
                block.forward = _returning(form.wrap(hidden))
            yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.forward = forward


def _close(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    """Whether two hidden states are equal up to ``tolerance`` of the largest number."""
    if one is None or other is None or one.shape != other.shape:
        return one is other
    scale = tolerance * float(other.abs().max()) if tolerance else 0.0
    return torch.allclose(one, other, rtol=0, atol=scale, equal_nan=True)


def _returning(output: object) -> Callable[..., object]:
    def forward(*arguments: object, **options: object) -> object:
        return output

    return forward

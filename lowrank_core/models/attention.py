"""Which layers are an attention's value and output projections: seen in a forward pass, not guessed from names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_core.accounting import HeadUnit
from lowrank_core.models.handle import ModelHandle

__all__ = ["head_units"]


def head_units(handle: ModelHandle) -> tuple[HeadUnit, ...]:
    """Return each block's value and output projection as one unit, where the architecture has them apart and joins them plainly.

    The first token attends to itself alone: there, the input of the output projection is the value, repeated for the heads of a group.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with _recorded(handle, inputs, outputs), torch.no_grad():
        handle.module(input_ids=torch.tensor([[0, 1]], device=handle.device), use_cache=False)
    head_dim = _head_dim(handle)
    found = []
    for value in handle.shapes:
        for output in handle.shapes:
            if output.depth == value.depth and output.name != value.name and _repeats(inputs[output.name], outputs[value.name], head_dim):
                heads, groups = output.d_in // head_dim, value.d_out // head_dim
                found.append(HeadUnit((value, output), heads=heads, groups=groups, head_dim=head_dim))
    return tuple(found)


def _head_dim(handle: ModelHandle) -> int:
    config = handle.module.config
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


@contextmanager
def _recorded(handle: ModelHandle, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    def hook_for(name: str) -> object:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
            inputs[name], outputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])[0], result.reshape(-1, result.shape[-1])[0]

        return hook

    hooks = [handle.module.get_submodule(layer.name).register_forward_hook(hook_for(layer.name)) for layer in handle.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeats(read: Tensor, written: Tensor, head_dim: int) -> bool:
    """Return whether ``read`` (heads · head_dim,) is ``written`` (groups · head_dim,), each group's repeated for its heads."""
    heads, groups = read.numel() // head_dim, written.numel() // head_dim
    if read.numel() % head_dim or written.numel() % head_dim or groups == 0 or heads % groups:
        return False
    repeated = written.reshape(groups, head_dim).repeat_interleave(heads // groups, dim=0).flatten()
    scale = float(repeated.abs().max())
    return scale > 0 and bool((repeated - read).abs().max() <= 4 * torch.finfo(read.dtype).eps * scale)

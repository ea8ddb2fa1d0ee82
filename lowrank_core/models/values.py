"""Value projections of attention, by what a pass shows: no name tells.

The first token attends to itself alone: there, the input of an output projection is the value, repeated for the heads of a group. A
layer that reads the value at other tokens, too, is no output projection, and what it reads need not be a value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_core.models.walk import linear_maps

__all__ = ["ValueRead", "head_dim_of", "repeats", "value_reads"]


@dataclass(frozen=True)
class ValueRead:
    """A layer that reads another's output at the first token, by heads; ``mixed``: at the second it reads something else."""

    reader: str
    value: str
    mixed: bool


def value_reads(module: PreTrainedModel, prefix: str, blocks: nn.ModuleList, values: Mapping[str, int], ids: Tensor) -> list[ValueRead]:
    """Return who, of all linears of a block, reads what layers of it give.

    Args:
        prefix: dotted path of the blocks.
        values: names of the layers that may be a value projection -> depth of their block.
        ids: random tokens (1, 2): token 0 may be padding, whose embedding is zero.
    """
    readers = {f"{prefix}.{linear.depth}.{linear.path}": linear.depth for linear in linear_maps(module, blocks)}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with _recorded(module, readers, inputs, outputs), torch.no_grad():
        module(input_ids=ids, use_cache=False)
    return [
        ValueRead(reader, value, mixed=not repeats(inputs[reader][-1], outputs[value][-1], head_dim))
        for value, depth in values.items()
        for reader, place in readers.items()
        if place == depth
        and reader != value
        and {reader, value} <= set(inputs)
        and (head_dim := head_dim_of(module, depth)) is not None
        and repeats(inputs[reader][0], outputs[value][0], head_dim)
    ]


def head_dim_of(module: PreTrainedModel, depth: int) -> int | None:
    """Return the width of a head of a block, which blocks may differ in (Gemma 4); None for a model that has no attention."""
    config = module.config.get_text_config(decoder=True)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[depth]
    head_dim, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    if head_dim:
        return int(head_dim)
    return int(config.hidden_size) // int(heads) if heads else None


@contextmanager
def _recorded(module: nn.Module, names: Collection[str], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keep the rows (tokens, …) of what each layer reads and gives; one not called, or not as a linear layer is, is left out."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_: nn.Module, arguments: tuple[object, ...], result: object) -> None:
            read = arguments[0] if arguments else None
            if isinstance(read, Tensor) and isinstance(result, Tensor) and read.numel() and result.numel():
                inputs[name], outputs[name] = read.reshape(-1, read.shape[-1]), result.reshape(-1, result.shape[-1])

        return hook

    hooks = [module.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def repeats(read: Tensor, written: Tensor, head_dim: int) -> bool:
    """Return whether ``read`` (heads · head_dim,) is ``written`` (groups · head_dim,), each group's repeated for its heads."""
    heads, groups = read.numel() // head_dim, written.numel() // head_dim
    if read.numel() % head_dim or written.numel() % head_dim or groups == 0 or heads % groups:
        return False
    repeated = written.reshape(groups, head_dim).repeat_interleave(heads // groups, dim=0).flatten()
    scale = float(repeated.abs().max())
    return scale > 0 and bool((repeated - read).abs().max() <= 4 * torch.finfo(read.dtype).eps * scale)

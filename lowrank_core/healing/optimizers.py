"""The optimisers of a healing, and their state as named tensors, so that it fits into a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["adam", "packed_state", "settle", "soap", "unpacked_state"]

_BETAS = (0.9, 0.95)
_LARGEST_BASIS = 1024
"""Width up to which SOAP turns a side of a factor into its eigenbasis; the memory for it grows with the square."""
_TENSOR = "tensor"


def adam(parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return AdamW without decay (arXiv 1711.05101)."""
    return torch.optim.AdamW(parameters, betas=_BETAS, weight_decay=0.0)


def soap(parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return SOAP, which is Adam in the eigenbases of the gradients' second moments (arXiv 2409.11321), without decay.

    A factor reads features, and few directions of those hold nearly all of the energy: Adam, which scales single entries,
    takes steps that are as long in the others. The first step only measures.
    """
    from pytorch_optimizer.optimizer.soap import SOAP

    # Near to the dense model gradients are small: an ε of 1e-8 would be most of the denominator.
    return SOAP(parameters, betas=_BETAS, weight_decay=0.0, eps=1e-15, max_precondition_dim=_LARGEST_BASIS)


def settle(optimizer: Optimizer) -> None:
    """Lay the state out in memory as it would be after a reload: the same numbers in another order of strides round otherwise."""

    def settled(value: object) -> object:
        if isinstance(value, Tensor):
            return value.contiguous()
        return [settled(item) for item in value] if isinstance(value, list) else value

    for state in optimizer.state.values():
        state.update({name: settled(value) for name, value in state.items()})


def packed_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], object]:
    """Return the tensors of the state by name, and the rest as what JSON can hold, with the names in the tensors' places."""
    tensors: dict[str, Tensor] = {}

    def packed(value: object, path: str) -> object:
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
            return {_TENSOR: path}
        if isinstance(value, Mapping):
            return {"items": [[key, packed(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [packed(item, f"{path}.{place}") for place, item in enumerate(value)]
        return value

    return tensors, packed(optimizer.state_dict(), "state")


def unpacked_state(tensors: Mapping[str, Tensor], words: object) -> object:
    """Return what ``Optimizer.load_state_dict`` takes.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(words, Mapping):
        if _TENSOR in words:
            return tensors[words[_TENSOR]]
        return {key: unpacked_state(tensors, item) for key, item in words["items"]}
    if isinstance(words, list):
        return [unpacked_state(tensors, item) for item in words]
    return words

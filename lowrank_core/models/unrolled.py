"""Modules of an architecture whose matrices are held as linear layers of their own: experts of a mixture, parts of a fused projection.

A state dict has the names and tensors of the architecture while all the layers are dense, so that what a user saves is an ordinary folder.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

__all__ = [
    "Unrolled",
    "as_native",
    "kept_in_memory",
    "linear_layer",
    "natively",
    "put",
    "replace_module",
    "roll_back",
    "stands_for",
    "stored_tensors",
    "stripped",
    "unrolled_in",
]


class Unrolled(nn.Module):
    """Stands for a module of the architecture; linear layers hold its matrices.

    Attributes:
        native: that module without its matrices; what else it computes is still asked of it.
        matrices: names of the parameters that the linear layers stand for, biases left out.
    """

    native: nn.Module
    matrices: ClassVar[Sequence[str]]

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_rolled_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_unrolled_state)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def linears(self) -> tuple[nn.Module, ...]:
        """The linear layers, dense or replaced."""

    @abstractmethod
    def again(self, native: nn.Module) -> Self:
        """Return what this module became, made of ``native`` with all its matrices."""

    @abstractmethod
    def rolled(self) -> nn.Module:
        """Return a module of the architecture with the matrices of the linear layers, all of them dense."""

    def stored_as(self, layer: str) -> str:
        """Return the name of the parameter of the architecture that holds this layer."""
        return self.matrices[0]

    @property
    def dense(self) -> bool:
        """Whether no layer is replaced."""
        return all(type(layer) is nn.Linear for layer in self.linears)


def _rolled_state(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Put the tensors of the architecture into a state dict in place of those of dense layers."""
    assert isinstance(module, Unrolled)
    if module.dense:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        state.update({f"{prefix}{name}": tensor for name, tensor in module.rolled().state_dict().items()})


def _unrolled_state(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: object) -> None:
    """Put the tensors of dense layers into a state dict that has those of the architecture."""
    assert isinstance(module, Unrolled)
    if any(f"{prefix}{name}" in state for name in module.matrices):
        native = module.rolled()
        names = list(native.state_dict())
        native.load_state_dict({name: state.pop(f"{prefix}{name}") for name in names})
        again = module.again(native)
        state.update({f"{prefix}{name}": parameter.detach() for name, parameter in again.named_parameters()})


def unrolled_in(model: nn.Module) -> Iterator[tuple[str, Unrolled]]:
    """Yield dotted path and module of everything that is held as linear layers."""
    for name, child in model.named_modules():
        if isinstance(child, Unrolled):
            yield name, child


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at the dotted path ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def kept_in_memory(module: nn.Module) -> None:
    """Do nothing with a module that was put into a model: what others ``settle``."""


def roll_back(
    model: nn.Module, *, keep: Callable[[Unrolled], bool] = lambda _: False, settle: Callable[[nn.Module], None] = kept_in_memory
) -> None:
    """Put the architecture's own modules back, in place, but for those that ``keep`` says stay linear layers.

    Args:
        settle: is called with each module that is put in, before the next one is made.
    """
    for name, child in list(unrolled_in(model)):
        if not keep(child):
            native = child.rolled()
            settle(native)
            replace_module(model, name, native)


@contextmanager
def natively(*models: nn.Module) -> Iterator[None]:
    """Let models run on the architecture's own modules where all layers are dense, as they would be stored: one product, not several."""
    dense = [(model, name, child) for model in models for name, child in unrolled_in(model) if child.dense]
    try:
        for model, name, child in dense:
            replace_module(model, name, child.rolled())
        yield
    finally:
        for model, name, child in dense:
            replace_module(model, name, child)


def stored_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict in the order of names; one module that is held as linear layers has its tensors joined at a time."""
    if isinstance(module, Unrolled) or not any(True for _ in unrolled_in(module)):
        yield from sorted(module.state_dict(prefix=prefix).items())
        return
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    own |= {name: tensor for name, tensor in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set}
    children = {f"{name}.": child for name, child in module._modules.items() if child is not None}
    for name in sorted([*own, *children]):
        if name in own:
            yield f"{prefix}{name}", own[name]
        else:
            yield from stored_tensors(children[name], f"{prefix}{name}")


def stands_for(model: nn.Module, layer: str) -> str | None:
    """Return the parameter of the architecture that holds the linear layer ``layer``, if that is not its own ``weight``."""
    owner, _, leaf = layer.rpartition(".")
    while owner:
        module = model.get_submodule(owner)
        if isinstance(module, Unrolled):
            return f"{owner}.{module.stored_as(leaf)}"
        owner = owner.rpartition(".")[0]
    return None


def linear_layer(matrix: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """Return a linear layer with a copy of the matrix (d_out, d_in) and bias (d_out,), trainable as ``like`` is."""
    with torch.device("meta"):
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(matrix.detach().clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=like.requires_grad)
    return layer


def stripped(native: nn.Module, names: Collection[str]) -> nn.Module:
    """Return a copy of the module without these parameters."""
    gone = [name for name in names if getattr(native, name, None) is not None]
    result = copy.deepcopy(native, {id(getattr(native, name)): None for name in gone})
    for name in gone:
        result.register_parameter(name, None)
    return result


def put(native: nn.Module, name: str, value: Tensor) -> None:
    """Give a stripped module a parameter."""
    native.register_parameter(name, nn.Parameter(value.detach().contiguous(), requires_grad=False))


def as_native(native: nn.Module) -> nn.Module:
    """Return a module that has its matrices again, as the architecture's own."""
    native.__dict__.pop("_is_hf_initialized", None)
    return native

"""Linear maps that share their first factor: z = down x is stored once, and where possible multiplied once."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_core.errors import ModelError
from lowrank_core.layers.base import CompressedModule, Entry
from lowrank_core.layers.quantized import Factor, QuantizedMatrix, applied, dense_of

__all__ = ["ProductMemory", "StackedLinear"]


@dataclass
class _Product:
    """A product, the tensors that it was made from and what state they were in, and how often it will be read."""

    factors: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    states: tuple[tuple[int, int], ...]
    value: Tensor
    readers: int


class ProductMemory:
    """The last ``down x``, until its last reader took it, x is gone, or it is forgotten.

    It is found by the identity, the version and the place in memory of x and ``down``. Tensors of ``torch.inference_mode``
    have no version: for them nothing is kept. A copy of a memory is empty.
    """

    def __init__(self) -> None:
        self._product: _Product | None = None

    def __reduce__(self) -> tuple[type[ProductMemory], tuple[()]]:
        return ProductMemory, ()

    @property
    def empty(self) -> bool:
        return self._product is None

    def forget(self) -> None:
        self._product = None

    def keep(self, input: Tensor, down: Tensor, value: Tensor, *, readers: int) -> None:
        """Remember ``value`` for so many readers."""
        states = _states(input, down)
        if states is not None:
            self._product = _Product((weakref.ref(input, self._input_gone), weakref.ref(down)), states, value, readers)

    def take(self, input: Tensor, down: Tensor) -> Tensor | None:
        """Return the product of these very tensors, unchanged since, or None."""
        product = self._product
        if product is None or product.factors[0]() is not input or product.factors[1]() is not down:
            return None
        if product.states != _states(input, down):
            self._product = None
            return None
        product.readers -= 1
        if product.readers < 1:
            self._product = None
        return product.value

    def _input_gone(self, reference: weakref.ref[Tensor]) -> None:
        if self._product is not None and self._product.factors[0] is reference:
            self._product = None


def _states(*tensors: Tensor) -> tuple[tuple[int, int], ...] | None:
    try:
        return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors)
    except RuntimeError:  # inference tensors have no version, those of functorch no place
        return None


def _may_share(input: Tensor) -> bool:
    """Whether a product may serve a second reader: not where a graph is recorded, or a region decides on its dtype."""
    device = input.device.type
    return not torch.is_grad_enabled() and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


class StackedLinear(CompressedModule):
    """A linear map that reads z = down x, with ``down`` (rank, in_features) its own or that of the leader of its stack.

    A follower has no ``down``, so that parameters and state_dict hold it once. The link is no submodule; copying a whole
    model keeps it inside the copy. Members that are called with the same tensor, as q, k and v are, multiply it by ``down``
    once, where no gradients are recorded; moving or casting a follower alone leaves its leader where it is.
    """

    down: Factor | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, leader: StackedLinear | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.register_parameter("down", nn.Parameter(torch.empty(rank, in_features)) if leader is None else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self._leader = () if leader is None else (leader,)  # in a tuple: nn.Module would register it
        self._followers = 0
        self._memory = ProductMemory()
        if leader is not None:
            leader._followers += 1

    @property
    def leader(self) -> StackedLinear:
        """The member that holds ``down``: itself, unless it follows another."""
        return self._leader[0] if self._leader else self

    @property
    def _shared(self) -> Factor:
        down = self.leader.down
        assert down is not None
        return down

    @property
    def shared_down(self) -> Tensor:
        """``down`` (rank, in_features) of the leader."""
        return dense_of(self._shared)

    def reduced(self, input: Tensor) -> Tensor:
        """Return z = down x (..., rank), from the leader's memory if it has just been made."""
        down = self._shared
        if torch.compiler.is_compiling():
            return applied(down, input)
        stored = down.values if isinstance(down, QuantizedMatrix) else down
        if self._leader:
            remembered = self.leader._memory.take(input, stored) if _may_share(input) else None
            return applied(down, input) if remembered is None else remembered
        self._memory.forget()
        value = applied(down, input)
        if self._followers and _may_share(input):
            self._memory.keep(input, stored, value, readers=self._followers)
        return value

    @abstractmethod
    def expanded(self, reduced: Tensor) -> Tensor:
        """Return W x without the bias (..., out_features) from z = down x (..., rank)."""

    def spec(self, names: Mapping[nn.Module, str]) -> dict[str, object]:
        """As ``CompressedModule.spec``.

        Raises:
            ModelError: the leader is not part of the model.
        """
        entry: dict[str, object] = {"form": self.form, "rank": self.rank, "bias": self.bias is not None, **self._grid_entry()}
        if self._leader:
            if self.leader not in names:
                raise ModelError(
                    f"{names[self]}: the leader of its stack is not part of the model. Replace all layers of a stack together."
                )
            entry["source"] = names[self.leader]
        return entry

    @classmethod
    def _rank_of(cls, entry: Entry, shape: tuple[int, int], leader: CompressedModule | None) -> int:
        rank = entry.integer("rank", 1, min(entry.stack_rows, shape[1]))
        if leader is not None and (type(leader) is not cls or leader.rank != rank or leader.in_features != shape[1]):
            entry.refuse("source", "it has another form, rank or input size")
        return rank

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
        return f"{text}, shared" if self._leader else text

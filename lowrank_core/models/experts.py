"""Experts of a mixture as linear layers, one for each matrix of each expert.

transformers holds the experts of a block in 3-D parameters. Here they become ordinary linear layers that see the tokens routed to them,
so that all that is done with a linear layer (moments, factors, ranks, storage) is done with an expert's, too. Carriers are recognised
by their structure and verified by behaviour; another class of experts is left alone.

Notation::

    E, N, k     experts, tokens of a pass, experts per token;  H, I   hidden and intermediate width
    w           routing weight: an expert's output is multiplied by it
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from lowrank_core.models.unrolled import Unrolled, as_native, kept_in_memory, linear_layer, put, replace_module, stripped, unrolled_in

__all__ = ["FIRST_LAYERS", "Expert", "Routed", "UnrolledExperts", "calling_every_expert", "experts_of", "unroll_experts"]

FIRST_LAYERS = ("gate", "up")
"""Layers of an expert that read what it is given."""

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Routed:
    """Tokens of a pass that reach an expert.

    Attributes:
        weights: w of each row (n,).
        tokens: position of each row among the tokens of the pass (n,), ascending; empty where the mixture does not say.
    """

    weights: Tensor
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class Expert(nn.Module):
    """The linear layers of one expert.

    Attributes:
        routed: which tokens reach it, while it is called.
    """

    routed: Routed | None = None

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class UnrolledExperts(Unrolled):
    """Stands for a module with 3-D parameters; its children ``0`` … ``E-1`` are the experts.

    Attributes:
        matrices: names of those parameters, biases left out.
        tells_rows: whether it is known which tokens the rows of an expert are, so that two models can be compared row by row.
        call_all: whether experts that no token reaches are called as well, with no rows.
        rows: rows that the experts computed in the last pass.
    """

    matrices: ClassVar[Sequence[str]]
    tells_rows: ClassVar[bool] = True
    call_all = False
    rows = 0

    def __init__(self, native: nn.Module, experts: Sequence[Expert]) -> None:
        super().__init__()
        self.native = native
        native._is_hf_initialized = True  # type: ignore[assignment]  # its matrices are gone: nothing is left to initialise
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    @classmethod
    @abstractmethod
    def fits(cls, native: nn.Module) -> bool:
        """Return whether ``native`` has the structure of this carrier."""

    @classmethod
    @abstractmethod
    def of(cls, native: nn.Module) -> Self:
        """Return the same mixture as linear layers; ``native`` is not changed."""

    @abstractmethod
    def probe(self) -> tuple[Tensor, ...]:
        """Return random arguments of a call, to compare this module with the one that it stands for."""

    @abstractmethod
    def routing(self, *arguments: Tensor) -> list[Routed]:
        """Return the tokens that reach each expert in a call with these arguments."""

    def again(self, native: nn.Module) -> Self:
        return self.of(native)

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return tuple(layer for expert in self.experts for layer in expert.children())

    @property
    def experts(self) -> list[Expert]:
        return [child for child in self.children() if isinstance(child, Expert)]

    def inputs(self, number: int, routed: Routed, *arguments: Tensor) -> Tensor:
        """Return what expert ``number`` reads of a call's arguments at the tokens of ``routed`` (n, H), if ``tells_rows``."""
        raise NotImplementedError

    def intermediate(self, expert: Expert, inputs: Tensor) -> Tensor:
        """Return what the last layer of an expert reads (n, I), given what the first ones read (n, H), if ``tells_rows``."""
        raise NotImplementedError

    def bound(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the arguments of a call in the order of ``forward``."""
        return tuple(inspect.signature(self.forward).bind(*arguments, **options).arguments.values())


class RoutedExperts(UnrolledExperts):
    """Experts that are given hidden states, chosen experts (N, k) and routing weights (N, k): transformers' ``experts interface``.

    Whether there is a gate, how it is applied, biases, transposed or interleaved storage: the module itself says so. Indices of E and
    more are experts that hand their input on (LongCat-Flash).
    """

    matrices: ClassVar[Sequence[str]] = ("gate_up_proj", "up_proj", "down_proj")

    @classmethod
    def fits(cls, native: nn.Module) -> bool:
        takes_routing = hasattr(native, "has_gate") or len(inspect.signature(type(native).forward).parameters) == 4
        return takes_routing and any(_are_stacks(native, (first, "down_proj")) for first in ("gate_up_proj", "up_proj"))

    @classmethod
    def of(cls, native: nn.Module) -> Self:
        last = native.down_proj
        assert isinstance(last, Tensor)
        experts = [Expert({name: linear_layer(*part) for name, part in _parts(native, e).items()}) for e in range(len(last))]
        return cls(stripped(native, [*cls.matrices, *(f"{name}_bias" for name in cls.matrices)]), experts)

    def probe(self) -> tuple[Tensor, ...]:
        expert = self.experts[0]
        assert isinstance(expert.up, nn.Linear)
        weight, count = expert.up.weight, len(self.experts)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(_PROBE_TOKENS, weight.shape[1], generator=generator)
        index = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(_PROBE_TOKENS)])
        weights = torch.rand(index.shape, generator=generator)
        return hidden.to(weight), index.to(weight.device), weights.to(weight)

    def routing(self, *arguments: Tensor) -> list[Routed]:
        _, index, weights = arguments
        index, weights = index.reshape(-1, index.shape[-1]), weights.reshape(-1, index.shape[-1])
        result = []
        for number in range(len(self.experts)):
            tokens, slot = torch.where(index == number)
            result.append(Routed(weights[tokens, slot], tokens))
        return result

    def stored_as(self, layer: str) -> str:
        return next(name for name, layers in _layers_of(self.native).items() if layer in layers)

    def inputs(self, number: int, routed: Routed, *arguments: Tensor) -> Tensor:
        return arguments[0].flatten(0, -2)[routed.tokens]

    def intermediate(self, expert: Expert, inputs: Tensor) -> Tensor:
        native: Any = self.native
        up: Tensor = expert.up(inputs)  # type: ignore[operator]
        if not _has_gate(native):
            return cast(Tensor, native.act_fn(up))
        gate: Tensor = expert.gate(inputs)  # type: ignore[operator]
        if not hasattr(native, "_apply_gate"):
            return cast(Tensor, native.act_fn(gate) * up)
        both = torch.cat([gate, up], -1) if _is_concatenated(native) else torch.stack([gate, up], -1).flatten(-2)
        return cast(Tensor, native._apply_gate(both))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        result = torch.zeros_like(rows)
        routing = self.routing(hidden_states, top_k_index, top_k_weights)
        self.rows = sum(len(routed.weights) for routed in routing)
        for expert, routed in zip(self.experts, routing, strict=True):
            if len(routed.weights) or self.call_all:
                expert.routed = routed
                added = expert.down(self.intermediate(expert, rows[routed.tokens]))  # type: ignore[operator]
                if getattr(self.native, "has_post_expert_norm", False):
                    added = self.native.post_expert_norm(added)  # type: ignore[operator]
                result.index_add_(0, routed.tokens, (added * routed.weights[:, None]).to(result.dtype))
                expert.routed = None
        handed_on = torch.where(top_k_index < len(self.experts), 0, top_k_weights).sum(-1, keepdim=True)
        if hasattr(self.native, "identity_expert"):
            result = result + rows * handed_on.to(rows.dtype).reshape(-1, 1)
        return result.reshape(hidden_states.shape)

    def rolled(self) -> nn.Module:
        native: Any = copy.deepcopy(self.native)
        experts: list[Any] = self.experts
        for name, layers in _layers_of(native).items():
            parts = [torch.stack([getattr(expert, layer).weight for expert in experts]) for layer in layers]
            matrix = _joined(parts, native, dim=1)
            if name != "down_proj" and hasattr(native, "total_experts"):  # LongCat-Flash has unused matrices for those that hand on
                matrix = torch.cat([matrix, matrix.new_zeros(native.total_experts - len(experts), *matrix.shape[1:])])
            put(native, name, matrix.transpose(1, 2) if _is_transposed(native) else matrix)
            if getattr(native, "has_bias", False):
                biases = [torch.stack([getattr(expert, layer).bias for expert in experts]) for layer in layers]
                put(native, f"{name}_bias", _joined(biases, native, dim=1))
        return as_native(native)


class BatchedExperts(RoutedExperts):
    """Experts that are all given all tokens (E·N, H), times their routing weight, which is zero where they were not chosen (Llama 4)."""

    matrices = ("gate_up_proj", "down_proj")

    @classmethod
    def fits(cls, native: nn.Module) -> bool:
        return _are_stacks(native, cls.matrices) and cls.takes_all_tokens(native)

    @staticmethod
    def takes_all_tokens(native: nn.Module) -> bool:
        """Whether hidden states are all that the module is given."""
        return len(inspect.signature(type(native).forward).parameters) == 2 and not hasattr(native, "has_gate")

    def probe(self) -> tuple[Tensor, ...]:
        hidden, _, _ = super().probe()
        return (hidden.repeat(len(self.experts), 1),)

    def routing(self, *arguments: Tensor) -> list[Routed]:
        reached = (arguments[0].detach() != 0).any(-1).reshape(len(self.experts), -1)
        tokens = [mask.nonzero()[:, 0] for mask in reached]
        return [Routed(arguments[0].new_ones(len(chosen)), chosen) for chosen in tokens]

    def inputs(self, number: int, routed: Routed, *arguments: Tensor) -> Tensor:
        return arguments[0].reshape(len(self.experts), -1, arguments[0].shape[-1])[number][routed.tokens]

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        by_expert = hidden_states.reshape(len(self.experts), -1, hidden_states.shape[-1])
        routing = self.routing(hidden_states)
        self.rows = sum(len(routed.weights) for routed in routing)
        results = []
        for expert, rows, routed in zip(self.experts, by_expert, routing, strict=True):
            result = torch.zeros_like(rows)
            if len(routed.weights) or self.call_all:
                expert.routed = routed
                added = expert.down(self.intermediate(expert, rows[routed.tokens]))  # type: ignore[operator]
                result = result.index_add(0, routed.tokens, added.to(result.dtype))
                expert.routed = None
            results.append(result)
        return torch.cat(results)


class SortedExperts(UnrolledExperts):
    """One linear layer per expert, given rows sorted by expert and how many each has (JetMoE); whose rows they are is not said."""

    matrices = ("weight",)
    tells_rows = False

    @classmethod
    def fits(cls, native: nn.Module) -> bool:
        weight = getattr(native, "weight", None)
        return isinstance(weight, nn.Parameter) and weight.ndim == 3 and all(hasattr(native, a) for a in ("num_experts", "output_size"))

    @classmethod
    def of(cls, native: nn.Module) -> Self:
        weight = native.weight
        assert isinstance(weight, Tensor)
        return cls(stripped(native, cls.matrices), [Expert({"linear": linear_layer(matrix, None, weight)}) for matrix in weight])

    def probe(self) -> tuple[Tensor, ...]:
        expert: Any = self.experts[0]
        weight: Tensor = expert.linear.weight
        rows = torch.randn(_PROBE_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        count = len(self.experts)
        sizes = [_PROBE_TOKENS, *[0] * (count - 1)] if count < 2 else [_PROBE_TOKENS // 2] * 2 + [0] * (count - 2)
        return rows.to(weight), sizes  # type: ignore[return-value]

    def routing(self, *arguments: Tensor) -> list[Routed]:
        rows, sizes = arguments
        return [Routed(rows.new_ones(int(size))) for size in sizes]

    def forward(self, inputs: Tensor, expert_size: Tensor) -> Tensor:
        routing = self.routing(inputs, expert_size)
        self.rows = len(inputs)
        results = []
        for expert, rows, routed in zip(self.experts, torch.split(inputs, [int(size) for size in expert_size]), routing, strict=True):
            expert.routed = routed
            results.append(expert.linear(rows))  # type: ignore[operator]
            expert.routed = None
        return torch.cat(results)

    def rolled(self) -> nn.Module:
        native = copy.deepcopy(self.native)
        experts: list[Any] = self.experts
        put(native, "weight", torch.stack([expert.linear.weight for expert in experts]))
        return as_native(native)


_CARRIERS: tuple[type[UnrolledExperts], ...] = (BatchedExperts, RoutedExperts, SortedExperts)


def unroll_experts(
    model: nn.Module, holding: Collection[str] | None = None, *, settle: Callable[[nn.Module], None] = kept_in_memory
) -> None:
    """Replace every mixture of ``model`` whose class is known by its linear layers, in place; one that they do not reproduce stays.

    Args:
        holding: dotted paths of layers; a mixture that holds none of them stays as it is. None for all mixtures.
        settle: is called with each module that was put in, before the next one is made.
    """
    for name, native in list(model.named_modules()):
        carrier = next((carrier for carrier in _CARRIERS if carrier.fits(native)), None)
        if carrier is None or not (holding is None or any(layer.startswith(f"{name}.") for layer in holding)):
            continue
        unrolled = carrier.of(native)
        if _reproduces(unrolled, native):
            settle(unrolled)
            replace_module(model, name, unrolled)


def experts_of(model: nn.Module) -> Iterator[tuple[str, UnrolledExperts]]:
    """Yield dotted path and module of each mixture that is held as linear layers."""
    for name, child in unrolled_in(model):
        if isinstance(child, UnrolledExperts):
            yield name, child


@contextmanager
def calling_every_expert(model: nn.Module) -> Iterator[None]:
    """Let every pass call every expert, one that no token reaches with no rows, so that hooks see all of them in all passes."""
    mixtures = [child for _, child in experts_of(model)]
    try:
        for child in mixtures:
            child.call_all = True
        yield
    finally:
        for child in mixtures:
            child.call_all = False


@torch.no_grad()
def _reproduces(unrolled: UnrolledExperts, native: nn.Module) -> bool:
    """Whether both give the same on random rows; what has no numbers yet is believed."""
    arguments = unrolled.probe()
    if arguments[0].is_meta:
        return True
    expected, result = native(*arguments), unrolled(*arguments)
    tolerance = math.sqrt(torch.finfo(result.dtype).eps)
    return bool((result - expected).float().norm() <= tolerance * expected.float().norm())


def _are_stacks(native: nn.Module, names: Sequence[str]) -> bool:
    """Whether the module has a matrix per expert under each of these names."""
    parameters = [getattr(native, name, None) for name in names]
    return all(isinstance(parameter, nn.Parameter) and parameter.ndim == 3 for parameter in parameters)


def _has_gate(native: nn.Module) -> bool:
    return bool(getattr(native, "has_gate", True))


def _is_concatenated(native: nn.Module) -> bool:
    return bool(getattr(native, "is_concatenated", True))


def _is_transposed(native: nn.Module) -> bool:
    """Whether matrices are stored (d_in, d_out); Llama 4's are, and it does not say so."""
    return bool(getattr(native, "is_transposed", BatchedExperts.takes_all_tokens(native)))


def _layers_of(native: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return name of a parameter -> the layers of an expert that it holds."""
    first = {"gate_up_proj": ("gate", "up")} if _has_gate(native) else {"up_proj": ("up",)}
    return {**first, "down_proj": ("down",)}


def _parts(native: nn.Module, expert: int) -> dict[str, tuple[Tensor, Tensor | None, Tensor]]:
    """Return layer -> its matrix (d_out, d_in) and bias (d_out,), and the parameter that they come from."""
    result: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}
    for name, layers in _layers_of(native).items():
        parameter = getattr(native, name)
        matrix = parameter[expert].T if _is_transposed(native) else parameter[expert]
        bias = getattr(native, f"{name}_bias")[expert] if getattr(native, "has_bias", False) else None
        biases = [None] * len(layers) if bias is None else _divided(bias, native, len(layers))
        result |= {
            layer: (rows, part, parameter) for layer, rows, part in zip(layers, _divided(matrix, native, len(layers)), biases, strict=True)
        }
    return result


def _divided(rows: Tensor, native: nn.Module, parts: int) -> Sequence[Tensor]:
    if parts == 1:
        return (rows,)
    return rows.chunk(parts) if _is_concatenated(native) else [rows[part::parts] for part in range(parts)]


def _joined(parts: Sequence[Tensor], native: nn.Module, dim: int) -> Tensor:
    """Return the inverse of ``_divided``, for all experts at once."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim) if _is_concatenated(native) else torch.stack(list(parts), dim + 1).flatten(dim, dim + 1)

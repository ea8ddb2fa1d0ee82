"""One walk over a model's parameters: which linear maps may be compressed, and what every other parameter is.

By structure here; that a layer is reached, and outside mixtures by every token, is seen in a pass (``handle.find_layers``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_core.coverage import MIN_OUTPUTS, Coverage, has_experts, kind_by_name
from lowrank_core.layers.base import CompressedModule
from lowrank_core.models.experts import UnrolledExperts, experts_of

__all__ = ["LinearMap", "coverage_of", "linear_maps"]


@dataclass(frozen=True)
class LinearMap:
    """A linear module of a block.

    Attributes:
        kind: ``linear`` or ``expert`` for one that may be compressed; else why it is left alone (``coverage.KINDS``).
        expert: number of the expert that it belongs to, or None.
        mixture: the module of that expert's mixture, or None.
    """

    depth: int
    path: str
    module: nn.Module
    kind: str
    expert: int | None = None
    mixture: UnrolledExperts | None = None

    @property
    def shared_path(self) -> str:
        """The path that all experts of the mixture have in common; outside one, ``path``."""
        if self.expert is None:
            return self.path
        owner, _, layer = self.path.rpartition(".")
        return f"{owner.rpartition('.')[0]}.{layer}"


def linear_maps(module: nn.Module, blocks: nn.ModuleList) -> Iterator[LinearMap]:
    """Yield each linear module of the blocks, dense or low-rank, in the order of the model."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for depth, block in enumerate(blocks):
        routers = _routers(block)
        experts = has_experts(path for path, _ in block.named_parameters())
        owners = {f"{path}.{number}": (number, mixture) for path, mixture in experts_of(block) for number, _ in enumerate(mixture.experts)}
        for path, child in block.named_modules():
            number, mixture = owners.get(path.rpartition(".")[0], (None, None))
            if isinstance(child, CompressedModule):
                yield LinearMap(depth, path, child, "lowrank", number, mixture)
            elif isinstance(child, nn.Linear) and mixture is not None:
                narrow = child.weight.shape[0] < MIN_OUTPUTS
                yield LinearMap(depth, path, child, "narrow" if narrow else "expert", number, mixture)
            elif isinstance(child, nn.Linear | Conv1D):
                shared = any(uses[id(parameter)] > 1 for parameter in child.parameters())
                kind = "shared" if shared else "router" if id(child) in routers else _kind(path, child, experts=experts)
                yield LinearMap(depth, path, child, kind)


def _kind(path: str, child: nn.Linear | Conv1D, *, experts: bool) -> str:
    shape = tuple(child.weight.shape[::-1] if isinstance(child, Conv1D) else child.weight.shape)
    kind = kind_by_name(f"{path}.weight", shape, experts=experts)
    if kind in ("router", "expert"):
        return kind if kind == "router" else "experts"  # a linear layer of its own, which sees some of the tokens
    return "narrow" if shape[0] < MIN_OUTPUTS else "linear"  # what a name may say of it otherwise: it is a linear layer


def _routers(block: nn.Module) -> set[int]:
    """Return ids of linears with as many outputs as the module that holds them has experts."""
    result: set[int] = set()
    for parent in block.modules():
        if isinstance(parent, UnrolledExperts):
            continue
        sizes = {
            p.shape[0]
            for child in parent.children()
            for p in child.parameters(recurse=False)
            if p.ndim == 3 and not isinstance(child, _ConvNd)
        } | {len(child.experts) for child in parent.children() if isinstance(child, UnrolledExperts)}
        result |= {id(child) for child in parent.children() if isinstance(child, nn.Linear) and child.weight.shape[0] in sizes}
    return result


def coverage_of(module: PreTrainedModel, prefix: str, blocks: nn.ModuleList, layers: Collection[str]) -> Coverage:
    """Return the kinds of all parameters, each counted once.

    Args:
        prefix: dotted path of the blocks.
        layers: names of the dense linears that may be compressed.
    """
    known = {**_tables(module), **_linear_parameters(module, prefix, blocks, layers)}
    experts = [has_experts(path for path, _ in block.named_parameters()) for block in blocks]
    counted = []
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        kind = known.get(id(parameter)) or _other_kind(name, tuple(parameter.shape), owner, (prefix, experts))
        counted.append((kind, parameter.numel()))
    return Coverage.of(counted)


def _tables(module: PreTrainedModel) -> dict[int, str]:
    """Return id of a parameter of embeddings and head -> kind."""
    head = module.get_output_embeddings()
    known = {} if head is None else {id(parameter): "head" for parameter in head.parameters()}
    weight = getattr(module.get_input_embeddings(), "weight", None)
    return known if weight is None else {**known, id(weight): "tied" if id(weight) in known else "embedding"}


def _linear_parameters(module: nn.Module, prefix: str, blocks: nn.ModuleList, layers: Collection[str]) -> Mapping[int, str]:
    known: dict[int, str] = {}
    for linear in linear_maps(module, blocks):
        kind = linear.kind
        if kind in ("linear", "expert") and f"{prefix}.{linear.depth}.{linear.path}" not in layers:
            kind = "unreached" if type(linear.module).forward in (nn.Linear.forward, Conv1D.forward) else "special"
        known |= {id(parameter): kind for parameter in linear.module.parameters()}
    return known


def _other_kind(name: str, shape: tuple[int, ...], owner: nn.Module, inside: tuple[str, list[bool]]) -> str:
    """Return the kind of a parameter that belongs to no linear module."""
    prefix, experts = inside
    depth, _, path = name.removeprefix(f"{prefix}.").partition(".")
    if name.startswith(f"{prefix}.") and depth.isdigit():
        if isinstance(owner, _ConvNd):
            return "convolution"
        kind = kind_by_name(path, shape, experts=experts[int(depth)])
        kind = "experts" if kind == "expert" else kind
        return "other" if kind in ("linear", "narrow") or isinstance(owner, nn.Embedding) else kind
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "vector" if len(shape) < 2 else "outside"

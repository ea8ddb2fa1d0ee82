"""Our format in vLLM: a plugin (entry point ``vllm.general_plugins``) that registers ``quant_method: lowrank``.

A linear layer of vLLM is one or several linears of the checkpoint (q, k, v; gate, up): its shards. Each is dense or one of our forms:
y_i = expand_i(reduce_i x) or reduce_i x with zeros. All reduce_i of a layer are one matrix, so that k shards are 1 + k products of
vLLM's own kernel. Tensors are gathered under the checkpoint's names; our modules check and interpret them once all are there.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from lowrank_core.errors import ModelError
from lowrank_core.files.grids import GRIDS
from lowrank_core.files.weights import guard_name
from lowrank_core.layers.base import CompressedModule, Entry
from lowrank_core.layers.channels import REDUCED_FORMS
from lowrank_core.layers.dense import DenseLinear
from lowrank_core.layers.forms import FORMS, form_of
from lowrank_core.layers.heads import OutputHeads, ValueHeads
from lowrank_core.layers.pivoted import PivotedLinear
from lowrank_core.layers.quantized import dense_of
from lowrank_core.layers.stacked import StackedLinear

__all__ = ["LowRankConfig", "LowRankMethod"]

_BIAS = "lowrank_bias"
"""vLLM's own layer need not have a bias where ours has, and passes over an unexpected tensor of the name ``bias``."""
_FACTORS = tuple(dict.fromkeys(name for form in FORMS.values() for name in form.factors))
_TENSORS = {
    **{name: name for name in ("weight", "pivots", "biases", *_FACTORS)},
    **{f"{name}_{part}": f"{name}.{part}" for name in _FACTORS for part in ("values", "scales")},
    _BIAS: "bias",
}
"""Attribute of vLLM's layer -> name of the tensor below a layer of the checkpoint."""
_ANY_ROWS = 1 << 40
_REFUSED = "Serve it with transformers (lowrank serve FOLDER), or export the form dense."


@register_quantization_config("lowrank")
class LowRankConfig(QuantizationConfig):
    """Entries of ``config.json``, under the names that vLLM gives the layers.

    Attributes:
        layers: name -> entry of a compressed layer; fused: name -> (name, rows) of the parts of a projection.
        handled: name in vLLM -> name in the checkpoint, of all linears that a ``LowRankMethod`` reads.
        loaded: name -> the tensors of the layer that reads it.
        experts: names of compressed layers of experts: vLLM's kernels take dense matrices, so that they are multiplied out.
    """

    def __init__(
        self, layers: Mapping[str, Mapping[str, Any]], fused: Mapping[str, Mapping[str, Any]], *, module_names: bool = False
    ) -> None:
        super().__init__()
        for name, entry in layers.items():
            if entry.get("form") in REDUCED_FORMS:
                raise ModelError(
                    f"model: {name} has fewer channels than its architecture, which the plugin for vLLM does not read. {_REFUSED}"
                )
            if entry.get("form") == DenseLinear.form or any(entry.get(grid.name) is True for grid in GRIDS.values() if grid.bits == 4):
                raise ModelError(f"model: {name} is quantised in a way that the plugin for vLLM does not read. {_REFUSED}")
        self.layers = {name: dict(entry) for name, entry in layers.items()}
        self.fused = dict(fused)
        self.guards = {guard_name(name, entry) for name, entry in layers.items()}
        self.stored = {name: name for name in (*layers, *fused)}
        self.handled: dict[str, str] = {}
        self.loaded: dict[str, Loaded] = {}
        self.experts = {name for name in layers if "guard" in layers[name] and not any(name.startswith(f"{whole}.") for whole in fused)}
        self.module_names, self.sparse_blocks = module_names, False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        return cls(config["layers"], config.get("fused") or {}, module_names=config.get("module_names") is True)

    def get_name(self) -> str:
        return "lowrank"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        def named(name: str) -> str:
            return str(hf_to_vllm_mapper.map_name(name) or name)

        self.stored = {named(name): old for name, old in self.stored.items()}
        self.fused = {named(name): layout for name, layout in self.fused.items()}
        self.layers = {
            named(name): {**entry, **({"source": named(entry["source"])} if "source" in entry else {})}
            for name, entry in self.layers.items()
        }

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Return how tensors become attributes of vLLM's layers. It is applied again to what a part of the model gets."""
        names = _alternatives({*self.handled, *self.handled.values()})
        parts = _alternatives(self.stored[name] for name in self.fused) if self.fused else "(?!)"
        tensors = "|".join(map(re.escape, sorted(_TENSORS.values(), key=len, reverse=True)))
        rules = {
            rf"^(?:.*\.)?(?:{_alternatives(self.guards)})$": None,
            rf"^((?:.*\.)?(?:{parts}))\.(\w+)\.({tensors})$": r"\1.part_\2__\3",
            rf"^((?:.*\.)?(?:{names}))\.bias$": rf"\1.{_BIAS}",
            r"__bias$": f"__{_BIAS}",
            rf"([._](?:{'|'.join(_FACTORS)}))\.(values|scales)$": r"\1_\2",
        }
        if self.module_names and self.sparse_blocks:
            rules[r"\.mlp\.(gate|experts)\."] = r".block_sparse_moe.\1."
        mapper = _Mapper(orig_to_new_regex={regex.compile(pattern): new for pattern, new in rules.items()})
        mapper.dense_experts = self.dense_experts
        return mapper

    @torch.no_grad()
    def dense_experts(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a checkpoint with those of compressed experts multiplied out, under the names of most architectures."""
        owners = tuple({f"{name.rsplit('.', 2)[0]}." for name in self.experts})
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights:
            if self.module_names and tensor.ndim == 3 and name.endswith((".gate_up_proj", ".down_proj")):
                yield from _divided(name, tensor)
            elif not name.startswith(owners) or name.endswith("_proj.weight"):
                yield name, tensor
            elif tensor.numel():
                owner = next(owner for owner in owners if name.startswith(owner))
                expert, leaf, rest = name.removeprefix(owner).split(".", 2)
                parts.setdefault(f"{owner}{expert}.{leaf}", {})[rest] = tensor
        loaded = Loaded(self, parts)
        loaded.parts = parts
        for name in list(parts):
            if name not in self.experts:
                yield f"{name}_proj.weight", loaded.dense(name)[0]
        loaded.shapes = {name: _shape_of(parts[name], parts[self.layers[name].get("source", name)]) for name in parts}
        for name in loaded.shapes:
            stored = loaded.module(name)
            dtype = next(tensor.dtype for tensor in stored.state_dict().values() if tensor.is_floating_point())
            exact = copy.deepcopy(stored).double()
            getattr(exact, "leader", exact).double()  # it comes along in the copy, but is no submodule
            yield f"{name}_proj.weight", exact.weight.to(dtype)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        self.sparse_blocks |= ".block_sparse_moe." in f".{prefix}."
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        whole = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        shards = [shard for name in whole for shard in self._parts(name)]
        compressed = [shard for shard in shards if shard.name in self.layers]
        if not compressed:
            return UnquantizedLinearMethod()
        above = (self.stored.get(compressed[0].name) or self.stored[whole[0]]).rpartition(".")[0]
        for shard in shards:
            self.handled[shard.name] = shard.name if shard.part else f"{above}.{shard.name.rpartition('.')[2]}"
        return LowRankMethod(self, shards)

    def _parts(self, name: str) -> list[Shard]:
        layout = self.fused.get(name)
        if layout is None:
            return [Shard(name)]
        if layout["chunks"] != 1:
            raise ModelError(f"model: vLLM stores the rows of {name} in another order, so that its parts can't be read. {_REFUSED}")
        return [Shard(f"{name}.{part}", part, rows) for part, rows in layout["parts"]]


class _Mapper(WeightsMapper):
    """Names, and before them the tensors of experts; stays so in a union."""

    dense_experts: Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]

    def __or__(self, other: WeightsMapper) -> _Mapper:
        return self._like(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> _Mapper:
        return self._like(WeightsMapper.__or__(other, self))

    def _like(self, mapper: WeightsMapper) -> _Mapper:
        result = _Mapper(**vars(mapper))
        result.dense_experts = self.dense_experts
        return result

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        result: Iterator[tuple[str, Tensor]] = super().apply(self.dense_experts(weights))
        return result


def _alternatives(names: Any) -> str:
    """Return a pattern of names, and of what is left of each in a model without its outermost module."""
    every = {short for name in names for short in (name, name.partition(".")[2] or name)}
    return "|".join(map(re.escape, sorted(every)))


def _divided(name: str, joined: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a 3-D parameter, (experts, rows, columns), of dense experts: gate and up are its first and second rows."""
    owner, _, leaf = name.rpartition(".")
    for expert, matrix in enumerate(joined):
        for part, rows in zip(("gate", "up"), matrix.chunk(2), strict=True) if leaf == "gate_up_proj" else [("down", matrix)]:
            yield f"{owner}.{expert}.{part}_proj.weight", rows


def _shape_of(own: Mapping[str, Tensor], leader: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (d_out, d_in) of a compressed layer, as its tensors and those of its leader have it."""
    rows = sum(len(own[name]) for name in ("up", "up.values", "coefficients", "coefficients.values", "pivots") if name in own)
    columns = next((leader[name].shape[1] for name in ("down", "down.values") if name in leader), 0)
    return rows, columns


def _attribute(part: str, tensor: str) -> str:
    return f"part_{part}__{tensor}" if part else tensor


@dataclass(frozen=True)
class Shard:
    """A linear of the checkpoint in a layer of vLLM; ``part`` and ``rows`` of one that the checkpoint's projection is divided into."""

    name: str
    part: str = ""
    rows: int = 0


class Product(nn.Module):
    """x Wᵀ + b by the kernel that vLLM picks for its own dense layers."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        self.gemm: Callable[..., Tensor] = dispatch_unquantized_gemm()
        if current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.gemm(self, input, self.weight, self.bias)


class Expand(nn.Module):
    """From z = reduce x (T, ·) to y (T, width): by a second factor, or by zeros in the dimensions that heads don't carry."""

    order: Tensor | None

    def __init__(self, module: CompressedModule | None) -> None:
        super().__init__()
        self.product: Product | None = None
        self.heads: tuple[int, int, int] | None = None
        self.span = slice(None)
        order = bias = None
        if isinstance(module, PivotedLinear):
            self.product, order, bias = Product(dense_of(module.coefficients)), module.order, module.bias
            self.span = slice(module.offset, module.offset + module.own)
        elif isinstance(module, StackedLinear):
            self.product = Product(dense_of(module.up), module.bias)  # type: ignore[arg-type]  # the other stacked form is factored
        elif isinstance(module, ValueHeads):
            self.heads = (module.groups, module.rank, module.head_dim)
        self.register_buffer("order", order, persistent=False)
        self.bias = bias

    def forward(self, z: Tensor) -> Tensor:
        if self.heads is not None:
            groups, rank, head_dim = self.heads
            return functional.pad(z.reshape(-1, groups, rank), (0, head_dim - rank)).flatten(1)
        if self.product is None:
            return z
        y: Tensor = self.product(z)
        if self.order is None:
            return y
        y = torch.cat([z[:, self.span], y], -1).index_select(1, self.order)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """All shards of a layer, computed from one input.

    Args:
        reduce: (matrix, bias or None) of each shard that has a first product of its own.
        spans: of each shard, its slice of what ``reduce`` computes; or a product of its own, where its leader is in another block.
        modules: of each shard; None where it is dense.
    """

    def __init__(
        self, reduce: list[tuple[Tensor, Tensor | None]], spans: list[slice | Product], modules: list[CompressedModule | None]
    ) -> None:
        super().__init__()
        self.reduce: Product | None = None
        if reduce:
            biases = [torch.zeros(len(matrix)).to(matrix) if bias is None else bias for matrix, bias in reduce]
            biased = any(bias is not None for _, bias in reduce)
            self.reduce = Product(torch.cat([matrix for matrix, _ in reduce]), torch.cat(biases) if biased else None)
        self.spans = [span if isinstance(span, slice) else None for span in spans]
        self.foreign = nn.ModuleList(nn.Identity() if isinstance(span, slice) else span for span in spans)
        self.expand = nn.ModuleList(Expand(module) for module in modules)
        outputs = [module for module in modules if isinstance(module, OutputHeads)]
        self.carried = (outputs[0].heads, outputs[0].head_dim, outputs[0].rank) if outputs else None

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, input.shape[-1])
        if self.carried is not None:
            heads, head_dim, rank = self.carried
            x = x.view(-1, heads, head_dim)[..., :rank].flatten(1)
        z = x if self.reduce is None else self.reduce(x)
        parts = [
            expand(foreign(x) if span is None else z[:, span])
            for span, foreign, expand in zip(self.spans, self.foreign, self.expand, strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y.view(*input.shape[:-1], -1)


class Loaded:
    """Tensors of some linears of the checkpoint, as far as they were loaded, and our modules of them.

    Attributes:
        parts: linear -> name -> tensor; shapes: linear -> (d_out, d_in).
    """

    def __init__(self, config: LowRankConfig, names: Iterable[str]) -> None:
        self.config = config
        self.parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        self.shapes: dict[str, tuple[int, int]] = {}
        self._modules: dict[str, CompressedModule] = {}
        config.loaded |= dict.fromkeys(self.parts, self)

    def dense(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the matrix and the bias of a linear that is not compressed.

        Raises:
            ModelError: there is none.
        """
        parts = self.parts.pop(name)
        if "weight" not in parts:
            raise ModelError(f"model: the files lack {name}.weight. Export the model again.")
        return parts["weight"], parts.get("bias")

    def module(self, name: str) -> CompressedModule:
        """Return the compressed layer ``name``, checked, with the tensors that were loaded.

        Raises:
            ModelError: its entry, its tensors or those of its leader are not what they should be.
        """
        if name not in self._modules:
            entry = Entry(name, self.config.layers[name], _ANY_ROWS)
            form, source = form_of(entry), entry.text("source")
            if source is not None and source not in self.config.loaded:
                entry.refuse("source", f"{source!r} is not compressed")
            leader = None if source is None else self.config.loaded[source].module(source)
            with torch.device("meta"):
                made = form.from_spec(entry, self.shapes[name], leader)
            try:
                made.load_state_dict(self.parts.pop(name), assign=True)
            except RuntimeError as error:
                raise ModelError(f"model: {name}: {str(error).splitlines()[-1].strip()} Export the model again.") from error
            self._modules[name] = made
        return self._modules[name]


class LowRankMethod(LinearMethodBase):
    """Loads and runs one layer of vLLM."""

    def __init__(self, config: LowRankConfig, shards: list[Shard]) -> None:
        self.config, self.shards = config, shards
        self.loaded = Loaded(config, [shard.name for shard in shards])

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        """Give the layer an empty parameter for each tensor that the checkpoint may have.

        Raises:
            ModelError: the layer is divided among devices.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ModelError("model: factors are not divided among devices. Set --tensor-parallel-size 1, or export the form dense.")
        rows = [shard.rows for shard in self.shards] if self.shards[0].part else output_partition_sizes
        self.loaded.shapes = {shard.name: (width, input_size) for shard, width in zip(self.shards, rows, strict=True)}
        device = torch.empty(0).device
        for index, part in enumerate(dict.fromkeys(shard.part for shard in self.shards)):
            for attribute in _TENSORS:
                parameter = nn.Parameter(torch.empty(0), requires_grad=False)
                parameter.weight_loader = self._loader(attribute, index if part else None, (device, params_dtype))  # type: ignore[attr-defined]
                layer.register_parameter(_attribute(part, attribute), parameter)

    def _loader(self, attribute: str, fixed: int | None, place: tuple[torch.device, torch.dtype]) -> Callable[..., None]:
        device, floats = place

        def load(_parameter: nn.Parameter, loaded: Tensor, shard_id: str | int | None = None) -> None:
            if shard_id is None:
                shard_id = getattr(loaded, "shard_id", 0)  # an argument or an attribute, by version
            index = {"q": 0, "k": 1, "v": 2}.get(str(shard_id), shard_id) if fixed is None else fixed
            dtype = floats if loaded.is_floating_point() else loaded.dtype
            self.loaded.parts[self.shards[int(index)].name][_TENSORS[attribute]] = loaded.to(device=device, dtype=dtype, copy=True)

        return load

    @torch.no_grad()
    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the products that compute the layer in place of its parameters."""
        for part in dict.fromkeys(shard.part for shard in self.shards):
            for attribute in _TENSORS:
                delattr(layer, _attribute(part, attribute))
        layer.bias = None  # added here
        modules = {shard.name: self.loaded.module(shard.name) if shard.name in self.config.layers else None for shard in self.shards}
        sources = {name: str(self.config.layers.get(name, {}).get("source", name)) for name in modules}
        reduce: list[tuple[Tensor, Tensor | None]] = []
        spans: dict[str, slice | Product] = {}
        for name, module in modules.items():
            if sources[name] not in modules:
                assert isinstance(module, StackedLinear)
                spans[name] = Product(module.shared_down)
            elif sources[name] == name:
                start = sum(len(matrix) for matrix, _ in reduce)
                reduce.append(self._reduce(name, module))
                spans[name] = slice(start, start + len(reduce[-1][0]))
        layer.lowrank = PackedLinear(reduce, [spans[name if name in spans else sources[name]] for name in modules], list(modules.values()))

    def _reduce(self, name: str, module: CompressedModule | None) -> tuple[Tensor, Tensor | None]:
        """Return matrix and bias of the first product of a shard that no other shares."""
        if isinstance(module, StackedLinear):
            return module.shared_down, None
        if isinstance(module, ValueHeads):
            biases = module.biases
            return module.reducing_matrix, None if biases is None else biases.flatten()
        if isinstance(module, OutputHeads):
            return dense_of(module.outputs), module.bias
        return self.loaded.dense(name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = layer.lowrank(x)
        return result

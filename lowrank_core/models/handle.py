"""A loaded model and the linear layers in it that may be compressed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lowrank_core.coverage import Coverage
from lowrank_core.errors import LowRankError, ModelError
from lowrank_core.layers.base import CompressedModule, PivotIndex
from lowrank_core.layers.quantized import QuantizedMatrix
from lowrank_core.models.experts import FIRST_LAYERS, UnrolledExperts
from lowrank_core.models.mapped import WeightMap, release
from lowrank_core.models.unrolled import stored_tensors
from lowrank_core.models.values import value_reads
from lowrank_core.models.walk import LinearMap, coverage_of, linear_maps
from lowrank_core.parameters import INDEX_BYTES, MatrixShape, module_type

__all__ = [
    "LayerSpec",
    "ModelHandle",
    "auto_class_of",
    "bias_of",
    "blocks_of",
    "describe",
    "find_layers",
    "head_flops",
    "own_code",
    "positions_of",
    "random_tokens",
    "text_config_of",
    "weight_of",
]

_INCIDENTAL = frozenset({"_name_or_path", "dtype", "quantization_config", "torch_dtype", "transformers_version"})
"""Entries of a model's config that say where it comes from, not what it computes."""

_RELEASED_BYTES = 2**24
"""A pass over all weights lets go of mapped ones after each tensor that is larger."""

_PROBE_TOKENS = 64
"""Of a pass that shows what reaches what: two would leave most of a layer that routes tokens unseen."""


def weight_of(module: nn.Module) -> Tensor:
    """Return W (d_out, d_in) of a linear module; GPT-2's ``Conv1D`` stores it transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return b (d_out,) of a linear module, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text decoder: all of it, but for models that also see or hear."""
    result: PretrainedConfig = config.get_text_config(decoder=True)
    return result


def auto_class_of(config: PretrainedConfig) -> str:
    """Return the class of transformers that loads a checkpoint, and what is made of it.

    That is the multimodal one for what the causal one does not know, or makes a model of that it does not know itself (Llama 3.2 Vision).
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    made = name and getattr(transformers, name).config_class.model_type
    known = made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return "AutoModelForCausalLM" if name and known else "AutoModelForMultimodalLM"


def positions_of(config: PretrainedConfig) -> int | None:
    """Return the positions that a model was made for, or None if its config does not say."""
    for name in ("max_position_embeddings", "max_seq_len"):  # the second is MPT's
        value = getattr(text_config_of(config), name, None)
        if value:
            return int(value)
    return None


@dataclass(frozen=True)
class LayerSpec:
    """A compressible layer: its matrix, and the layer that stands for everyone who reads the same input."""

    shape: MatrixShape

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def input_group(self) -> str:
        return self.shape.input_group


@dataclass(frozen=True)
class ModelHandle:
    """A model, its tokenizer and its compressible layers. Nobody edits the module through a handle.

    Attributes:
        reference: what the user called it.
        module: the causal language model, in eval mode.
        tokenizer: its tokenizer.
        layers: compressible layers in the order of the model.
        stored_dtype: of the checkpoint's weights; what is measured runs in the module's dtype, what is written is written in this.
        left_fused: sentences on layers that look like several projections in one matrix, and stay so.
        weights: where weights are mapped from that don't fit into memory; None where all are in memory.
    """

    reference: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[LayerSpec, ...]
    stored_dtype: torch.dtype
    left_fused: tuple[str, ...] = ()
    weights: WeightMap | None = None

    def settle(self, module: nn.Module) -> None:
        """Map the weights of a module that is put into the model, if those of the model are mapped."""
        if self.weights is not None:
            self.weights.settle(module)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    @property
    def dtype(self) -> str:
        """Dtype that the model is loaded in, such as ``float32``; ``stored_dtype`` is that of its checkpoint."""
        return str(self.module.dtype).removeprefix("torch.")

    @property
    def shapes(self) -> tuple[MatrixShape, ...]:
        return tuple(layer.shape for layer in self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the architecture (config without paths and versions) and names, dtypes and contents of all weights."""
        digest = hashlib.sha256(self._configuration)
        for name, tensor in stored_tensors(self.module):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            if self.weights is not None and tensor.nbytes > _RELEASED_BYTES:
                release(self.module)
        return digest.hexdigest()

    @property
    def config_fingerprint(self) -> str:
        """sha256 over the architecture alone: equal ones of two models with other fingerprints say that the weights differ."""
        return hashlib.sha256(self._configuration).hexdigest()

    @property
    def identity(self) -> dict[str, str]:
        """``dtype`` it is loaded in, and hashes of ``config`` and ``model`` (architecture with weights): equal ones mean the same model."""
        return {"dtype": self.dtype, "config": self.config_fingerprint, "model": self.fingerprint}

    @property
    def _configuration(self) -> bytes:
        config = {name: value for name, value in self.module.config.to_dict().items() if name not in _INCIDENTAL}
        return json.dumps(config, sort_keys=True, default=repr).encode()

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once; indices of pivoted layers and scales of quantised matrices count, too."""
        counts: list[int] = [p.numel() for p in self.module.parameters()]
        return sum(counts) + self._indices + self._quantized

    @property
    def linear_parameters(self) -> int:
        """Parameters of the compressible linears, and of what is low-rank already: what ``compression ratio`` counts."""
        return self._parameters_of(self.linear_names)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Names of the linears that ``compression ratio`` counts: the compressible ones, and those that are low-rank already."""
        return (*(layer.name for layer in self.layers), *self._low_rank_names)

    @property
    def _low_rank_names(self) -> tuple[str, ...]:
        return tuple(name for name, child in self.module.named_modules() if isinstance(child, CompressedModule))

    def linear_parameters_beside(self, dense: ModelHandle) -> tuple[int, int]:
        """Return the parameters of this model and of ``dense`` in one list of linears: what ``dense`` counts, or this one holds as factors.

        Each has its own list where their architectures differ.
        """
        names = {*dense.linear_names, *self._low_rank_names}
        if not all(names <= {name for name, _ in each.module.named_modules()} for each in (self, dense)):
            return self.linear_parameters, dense.linear_parameters
        return self._parameters_of(names), dense._parameters_of(names)

    @cached_property
    def coverage(self) -> Coverage:
        """Kind of every parameter; sums to ``parameters``."""
        prefix, blocks = blocks_of(self.module)
        result = coverage_of(self.module, prefix, blocks, {layer.name for layer in self.layers})
        return Coverage.of([*result.parameters.items(), ("lowrank", self._indices + self._quantized)])

    def _parameters_of(self, names: Iterable[str]) -> int:
        """Return the parameters of linears, each once; with indices, quantised numbers and scales."""
        counted: dict[int, int] = {id(p): p.numel() for name in names for p in self.module.get_submodule(name).parameters()}
        return sum(counted.values()) + self._indices + self._quantized

    @property
    def _indices(self) -> int:
        counts: list[int] = [child.pivots.numel() for child in self.module.modules() if isinstance(child, PivotIndex)]
        return sum(counts)

    @property
    def _matrices(self) -> list[QuantizedMatrix]:
        return [child for child in self.module.modules() if isinstance(child, QuantizedMatrix)]

    @property
    def _quantized(self) -> int:
        return sum(matrix.numbers for matrix in self._matrices)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix: what the config says of it is not so where a checkpoint has two that differ."""
        embedding, head = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        return head is not None and getattr(embedding, "weight", None) is head.weight

    @property
    def bytes(self) -> int:
        """Bytes of the weights and indices as they are stored on disk."""
        itemsize, floats = self.stored_dtype.itemsize, self.parameters - self._indices - self._quantized
        return floats * itemsize + self._indices * INDEX_BYTES + sum(matrix.bytes(itemsize) for matrix in self._matrices)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        stated = getattr(text_config_of(self.module.config), "vocab_size", None)
        return int(stated or self.module.get_input_embeddings().weight.shape[0])

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        stated = getattr(text_config_of(self.module.config), "hidden_size", None)
        return int(stated or self.module.get_input_embeddings().weight.shape[1])

    @property
    def max_context(self) -> int | None:
        """Positions that the model was made for, or None if its config does not say."""
        return positions_of(self.module.config)

    def check_context(self, context: int) -> None:
        """Raise unless windows of ``context`` tokens fit.

        Raises:
            ModelError: they are longer than the positions that the model was made for.
        """
        if self.max_context is not None and context > self.max_context:
            raise ModelError(f"the windows have {context} tokens, and {self.reference} takes {self.max_context}. Lower --context.")

    def check_tokens(self, ids: Tensor) -> None:
        """Raise unless windows of tokens (windows, context) fit.

        Raises:
            ModelError: they are too long, or hold tokens that the model has no embedding for.
        """
        self.check_context(ids.shape[1])
        embeddings = int(self.module.get_input_embeddings().weight.shape[0])
        largest = int(ids.max())
        if largest >= embeddings:
            raise ModelError(
                f"the tokenizer of {self.reference} gives token {largest}, and the model knows {embeddings} tokens. "
                "Give the tokenizer that the model was trained with."
            )

    def check_vocabulary(self, dense: ModelHandle) -> None:
        """Raise unless ``dense`` shares this model's vocabulary.

        Raises:
            ModelError: it does not, so that next-token distributions can't be compared.
        """
        if self.vocabulary != dense.vocabulary or self.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
            raise ModelError(
                f"{self.reference} and {dense.reference} have different vocabularies; compare a model with the one that it was made from."
            )


def blocks_of(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and list of the text decoder's blocks: of its lists of modules with parts, in no other list, the one with most numbers.

    Raises:
        ModelError: it has none.
    """
    decoder = module.get_decoder() if isinstance(module, PreTrainedModel) else module
    lists = _outermost_lists(decoder) or _outermost_lists(module)
    if not lists:
        raise ModelError("the model has no list of decoder blocks; only decoder-only transformers can be analysed.")
    blocks = max(lists, key=lambda entry: (_size(entry), len(entry)))
    return next(name for name, child in module.named_modules() if child is blocks), blocks


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    result: list[nn.ModuleList] = []
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            result += _outermost_lists(child)
        elif any(True for entry in child for _ in entry.children()):  # not a list of single layers, as Gemma 3n has outside its blocks
            result.append(child)
    return result


def _size(module: nn.Module) -> int:
    """Return the numbers that a module holds: quantised ones are buffers, no parameters."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def find_layers(module: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """Return the dense linear layers of the decoder blocks, with the input that each reads.

    Which layers share an input is seen, not guessed: a forward pass over random tokens tells by the identity of the tensors. The layers of
    an expert see the tokens that are routed to it: which share that is, the pass tells, too.
    ``ModelHandle.coverage`` says what is left out: shared weights, routers, narrow maps, what the pass does not reach with every token.

    Raises:
        ModelError: the model has no list of decoder blocks.
    """
    prefix, blocks = blocks_of(module)
    linears = [linear for linear in linear_maps(module, blocks) if linear.kind in ("linear", "expert")]
    ids = random_tokens(module, 1)
    readers = _input_readers(module, [linear.module for linear in linears if linear.kind == "linear"], ids)
    paths: dict[int, dict[str, None]] = {}
    for linear in linears:
        paths.setdefault(linear.depth, {})[linear.shared_path] = None
    groups: dict[object, str] = {}
    shapes = []
    for linear in linears:
        if linear.kind == "linear" and id(linear.module) not in readers:
            continue
        name = f"{prefix}.{linear.depth}.{linear.path}"
        group = groups.setdefault(readers.get(id(linear.module), _expert_input(linear)), name)
        kind = module_type(linear.shared_path, list(paths[linear.depth]))
        if linear.mixture is not None and "." not in kind:
            kind = ".".join(linear.shared_path.split(".")[-2:])
        d_out, d_in = weight_of(linear.module).shape
        shape = MatrixShape(name, kind, linear.depth, d_out, d_in, bias_of(linear.module) is not None, group)
        shapes.append(
            shape if linear.mixture is None else replace(shape, expert=linear.expert, active=_active(linear.mixture, ids.numel()))
        )
    reads = value_reads(module, prefix, blocks, {shape.name: shape.depth for shape in shapes if shape.expert is None}, ids[:, :2])
    values = {read.value for read in reads if read.mixed}
    return tuple(LayerSpec(replace(shape, role="v") if shape.name in values else shape) for shape in shapes)


def _expert_input(linear: LinearMap) -> object:
    """Return what layers of one expert that read the same have in common: gate and up do, the layer after them reads what they give."""
    owner, _, layer = linear.path.rpartition(".")
    return linear.depth, owner, layer in FIRST_LAYERS


def _active(mixture: UnrolledExperts, tokens: int) -> float:
    """Return the share of the tokens that reach an expert of the mixture on average, from the last pass, which had ``tokens``."""
    return min(1.0, mixture.rows / (len(mixture.experts) * tokens))


def random_tokens(module: PreTrainedModel, windows: int, *, seed: int = 0) -> Tensor:
    """Return windows of random tokens (windows, T) that a model takes, to see what a pass does; T is 64, or fewer where it takes fewer."""
    length = min(_PROBE_TOKENS, positions_of(module.config) or _PROBE_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(module.get_input_embeddings().weight.shape[0])
    return torch.randint(0, vocabulary, (windows, length), generator=generator).to(module.device)


def _input_readers(module: PreTrainedModel, linears: list[nn.Module], ids: Tensor) -> dict[int, int]:
    """Return id of a linear module -> id of the tensor that it reads, of those that are linear and see every token of a pass over ``ids``.

    What runs without gradients, such as DeepSeek V3.2's choice of the tokens to attend to, is none: no metric knows what its error costs.
    """
    inputs: dict[int, Tensor] = {}  # keeps the tensors alive, so that their ids stay distinct

    def hook(child: nn.Module, arguments: tuple[object, ...], result: object) -> None:
        read = arguments[0] if arguments else None
        seen = isinstance(read, Tensor) and read.numel() >= ids.numel() * read.shape[-1] and torch.is_grad_enabled()
        if isinstance(read, Tensor) and seen and _is_linear(child, read, result):
            inputs[id(child)] = read

    handles = [child.register_forward_hook(hook) for child in linears]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            module(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {child: id(tensor) for child, tensor in inputs.items()}


def _is_linear(child: nn.Module, read: Tensor, result: object) -> bool:
    """Whether the module gave W x + b; asked of classes with a forward of their own (Falcon's is linear, Llama 4's router is not)."""
    if type(child).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight, bias = weight_of(child), bias_of(child)
    if not isinstance(result, Tensor) or not weight.is_floating_point() or weight.shape != (result.shape[-1], read.shape[-1]):
        return False
    expected = nn.functional.linear(read, weight, bias)
    gap, scale = (result - expected).float().norm(), expected.float().norm()
    return bool(gap <= math.sqrt(torch.finfo(expected.dtype).eps) * scale)


@contextmanager
def own_code(handle: ModelHandle, doing: str) -> Iterator[None]:
    """Let what a model's own code raises name the model, and what it was ``doing``.

    Raises:
        ModelError: it raised something; memory that is not there is another matter.
    """
    try:
        yield
    except (LowRankError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise ModelError(
            f"{handle.reference}: {type(handle.module).__name__} of transformers fails at {doing} ({type(error).__name__}: {reason}). "
            "Try another version of transformers."
        ) from error


def head_flops(handle: ModelHandle) -> int:
    """Return what the output head takes for one token, multiply-adds as two; 0 where there is none."""
    head = handle.module.get_output_embeddings()
    return 0 if head is None else 2 * int(head.weight.numel())


def describe(handle: ModelHandle) -> dict[str, object]:
    """Return what the model is made of, ready for JSON."""
    return {
        "reference": handle.reference,
        "architecture": type(handle.module).__name__,
        "auto_class": auto_class_of(handle.module.config),
        "fingerprint": handle.fingerprint,
        "dtype": handle.dtype,
        "stored_dtype": str(handle.stored_dtype).removeprefix("torch."),
        "device": str(handle.device),
        "parameters": handle.parameters,
        "compressible_parameters": handle.linear_parameters,
        "coverage": handle.coverage.to_mapping(),
        "left_fused": list(handle.left_fused),
        "bytes": handle.bytes,
        "vocabulary": handle.vocabulary,
        "max_context": handle.max_context,
        "blocks": len(blocks_of(handle.module)[1]),
        "hidden": handle.width,
        "head_flops": head_flops(handle),
        "tied_embeddings": handle.tied,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.shape.kind,
                "depth": layer.shape.depth,
                "d_out": layer.shape.d_out,
                "d_in": layer.shape.d_in,
                "bias": layer.shape.bias,
                "parameters": layer.shape.dense_parameters,
                "input_group": layer.input_group,
                **({} if layer.shape.expert is None else {"expert": layer.shape.expert, "active": layer.shape.active}),
                **({"role": layer.shape.role} if layer.shape.role else {}),
            }
            for layer in handle.layers
        ],
    }

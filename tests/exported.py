"""Tiny compressed models that hold every form there is, for tests of what is written and read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_core.compression.build import CompressedModel, CompressionReport
from lowrank_core.layers.forms import Factors, HeadFactors, build_layers
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import bias_of, find_layers, weight_of
from lowrank_core.models.unrolled import replace_module

__all__ = ["IDS", "all_forms", "logits_of"]

IDS = torch.tensor([range(24)])
RANK = 12
STORAGES = ("factored", "pivoted", "heads")

_ATTENTION = "model.layers.{}.self_attn.{}_proj".format
_MLP = "model.layers.{}.mlp.{}_proj".format
_BLOCK = "transformer.h.{}.{}".format
_QKV = "transformer.h.{}.attn.c_attn.{}_proj".format

Units = Mapping[str, Sequence[tuple[str, ...]]]
_LLAMA: Units = {
    "factored": [(_ATTENTION(0, "o"),), tuple(_ATTENTION(0, kind) for kind in "qkv"), (_MLP(0, "gate"), _MLP(1, "gate"))],
    "pivoted": [(_MLP(0, "down"),), tuple(_ATTENTION(1, kind) for kind in "qk"), (_MLP(1, "up"), _MLP(0, "up"))],
    "heads": [(_ATTENTION(1, "v"), _ATTENTION(1, "o"))],
}
_GPT2: Units = {
    "factored": [(_QKV(0, "v"),), tuple(_QKV(1, kind) for kind in "qk"), (_BLOCK(0, "mlp.c_fc"), _BLOCK(1, "mlp.c_fc"))],
    "pivoted": [(_BLOCK(1, "attn.c_proj"),), (_BLOCK(1, "mlp.c_proj"), _BLOCK(0, "mlp.c_proj"))],
}
_EXPERT = "model.layers.0.mlp.experts.{}.{}".format
_MIXTRAL: Units = {
    "factored": [(_ATTENTION(0, "o"),), (_EXPERT(0, "gate"), _EXPERT(0, "up")), (_EXPERT(1, "down"),)],
    "pivoted": [(_EXPERT(2, "down"),)],
}
_UNITS: Mapping[str, Units] = {"gpt2": _GPT2, "mixtral": _MIXTRAL}


def logits_of(module: PreTrainedModel) -> Tensor:
    """Return (1, 24, vocabulary), float32."""
    with torch.inference_mode():
        logits: Tensor = module(input_ids=IDS.to(module.device), use_cache=False).logits
    return logits.float().cpu()


def all_forms(handle: ModelHandle, *, centred: bool = False, rank: int = RANK, storages: Sequence[str] = STORAGES) -> CompressedModel:
    """Return a copy with every form in it: single matrices, stacks within a block and across blocks, heads; some layers stay dense.

    With ``centred`` every compressed layer has a bias, as after a centred basis. Heads keep three quarters of their dimensions.
    ``storages`` leaves forms out.
    """
    module = copy.deepcopy(handle.module)
    ranks: dict[str, int | None] = {layer.name: None for layer in handle.layers}
    for storage, units in _UNITS.get(handle.module.config.model_type, _LLAMA).items():
        for names in units if storage in storages else ():
            factors = _heads(module, names, centred) if storage == "heads" else _factors(module, names, centred, rank)
            likes = [weight_of(module.get_submodule(name)) for name in names]
            for name, layer in build_layers(names, factors, "factored" if storage == "heads" else storage, likes).items():
                replace_module(module, name, layer)
                del ranks[name]
            ranks["+".join(names)] = _head_dim(module)[1] if storage == "heads" else rank
    module.requires_grad_(False)
    smaller = ModelHandle(handle.reference, module.eval(), handle.tokenizer, find_layers(module), handle.stored_dtype)
    return CompressedModel(smaller, _report(handle, smaller, ranks))


def _head_dim(module: PreTrainedModel) -> tuple[int, int]:
    """Return the dimensions of a head, and how many it keeps."""
    head_dim = module.config.hidden_size // module.config.num_attention_heads
    return head_dim, 3 * head_dim // 4


def _bias(module: PreTrainedModel, name: str, centred: bool) -> Tensor | None:
    """Return the bias of a layer; a centred basis moves it, or makes one."""
    layer = module.get_submodule(name)
    own = bias_of(layer)
    shift = torch.linspace(-0.1, 0.1, len(weight_of(layer)), dtype=torch.float64)
    if not centred:
        return None if own is None else own.detach().double()
    return shift if own is None else own.detach().double() + shift


def _factors(module: PreTrainedModel, names: tuple[str, ...], centred: bool, rank: int) -> Factors:
    weights = [weight_of(module.get_submodule(name)).detach().double() for name in names]
    left, values, right = torch.linalg.svd(torch.cat(weights), full_matrices=False)
    ups = (left[:, :rank] * values[:rank]).split([len(weight) for weight in weights])
    return Factors(tuple(ups), right[:rank], tuple(_bias(module, name, centred) for name in names))


def _heads(module: PreTrainedModel, names: tuple[str, ...], centred: bool) -> HeadFactors:
    value, output = (module.get_submodule(name) for name in names)
    bias, (head_dim, carried) = bias_of(value), _head_dim(module)
    width = value.weight.shape[1]
    return HeadFactors(
        values=value.weight.detach().double().reshape(-1, head_dim, width)[:, :carried],
        value_biases=None if bias is None else bias.detach().double().reshape(-1, head_dim)[:, :carried],
        outputs=output.weight.detach().double().reshape(width, -1, head_dim).transpose(0, 1)[..., :carried],
        output_bias=_bias(module, names[1], centred),
        head_dim=head_dim,
    )


def _report(before: ModelHandle, after: ModelHandle, ranks: Mapping[str, int | None]) -> CompressionReport:
    return CompressionReport(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        linear_parameters_before=before.linear_parameters,
        linear_parameters_after=after.linear_parameters,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        linear_flops_before=1,
        linear_flops_after=1,
        model_flops_before=1,
        model_flops_after=1,
        ranks=dict(ranks),
        units=(),
    )

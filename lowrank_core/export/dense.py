"""The dense merge: every compressed layer as the plain layer of the architecture, holding the product of the factors.

Any runtime reads it, and it is not smaller. A centred metric gives layers a bias, which most architectures have no place for: an empty
model tells before anything is compressed, and such biases can be left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_core.config import ExportConfig
from lowrank_core.errors import ModelError
from lowrank_core.layers.base import CompressedModule
from lowrank_core.metrics import METRICS, ErrorMetric
from lowrank_core.models.experts import unroll_experts
from lowrank_core.models.fused import layouts_of, split_fused
from lowrank_core.models.gguf import become_plain
from lowrank_core.models.handle import ModelHandle, bias_of
from lowrank_core.models.hf import compressed_modules
from lowrank_core.models.plain import architectures_of
from lowrank_core.models.unrolled import kept_in_memory, roll_back

__all__ = ["biases_without_place", "check_form", "dense_layer", "empty_model", "merged"]


def biases_without_place(handle: ModelHandle) -> tuple[str, ...]:
    """Return the compressible layers for whose bias the architecture has no place, whatever its config says."""
    _, _, homeless = _with_places_for_biases(handle.module, [layer.name for layer in handle.layers])
    return tuple(homeless)


def check_form(handle: ModelHandle, basis: ErrorMetric, config: ExportConfig) -> None:
    """Raise, before anything is calibrated, where the dense or plain form of what ``basis`` gives could not be written.

    Raises:
        ModelError: the metric adds biases that the architecture has no place for, and they are not to be dropped; or no text model.
    """
    if config.form == "plain":
        architectures_of(handle.module.config)
    if config.form == "dense" and basis.centred and not config.drop_biases:
        _refuse(handle.module, biases_without_place(handle))


def merged(
    module: PreTrainedModel, *, drop_biases: bool = False, settle: Callable[[nn.Module], None] = kept_in_memory
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return a copy of the model in its plain architecture, and the layers whose bias was left out.

    Products are computed in float64 and cast once.

    Args:
        settle: is called with each layer that is made, before the next one is.

    Raises:
        ModelError: a layer has a bias for which the architecture has no place, and it is not to be dropped.
    """
    compressed = dict(compressed_modules(module))
    config, skeleton, homeless = _with_places_for_biases(module, [name for name, child in compressed.items() if bias_of(child) is not None])
    if not drop_biases:
        _refuse(module, homeless)
    # deepcopy takes a replaced layer from its memo, so that no factor is copied to be thrown away.
    memo: dict[int, nn.Module] = {}
    for name, child in compressed.items():
        memo[id(child)] = dense_layer(child, skeleton.get_submodule(name), keep_bias=name not in homeless)
        settle(memo[id(child)])
    dense = copy.deepcopy(module, dict[int, Any](memo))
    _add_zero_biases(dense, skeleton)
    for model in (dense, skeleton):
        roll_back(model, settle=settle)
    dense.config = config
    become_plain(dense)
    result, expected = ({name: tensor.shape for name, tensor in model.state_dict().items()} for model in (dense, skeleton))
    assert result == expected, sorted(result.items() ^ expected.items())[:3]
    return dense, tuple(homeless)


def _refuse(module: PreTrainedModel, homeless: Sequence[str]) -> None:
    if homeless:
        plain = ", ".join(name for name, basis in METRICS.items() if not basis.centred)
        raise ModelError(
            f"dense: {type(module).__name__} has no place for the biases that a centred metric gives {len(homeless)} layers "
            f"(the first: {homeless[0]}). Drop biases without a place (--drop-biases), and have that cost measured, "
            f"export the compressed form, or compress with a metric that adds none: {plain}."
        )


def _with_places_for_biases(module: PreTrainedModel, biased: Sequence[str]) -> tuple[PretrainedConfig, PreTrainedModel, list[str]]:
    """Return a config under which the architecture has a bias in most of the layers ``biased``, its empty model, and the other layers."""
    config = copy.deepcopy(module.config)
    skeleton = empty_model(module, config)
    homeless = _without_place(biased, skeleton)
    for flag in [name for name, value in config.to_dict().items() if value is False and name.endswith("bias")]:
        if homeless:
            changed = copy.deepcopy(config)
            setattr(changed, flag, True)
            other = empty_model(module, changed)
            left = _without_place(biased, other)
            if len(left) < len(homeless):
                config, skeleton, homeless = changed, other, left
    return config, skeleton, homeless


def empty_model(module: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return the architecture without weights, with as many linear layers as ``module`` has."""
    with torch.device("meta"):
        skeleton = type(module)(copy.deepcopy(config))
    unroll_experts(skeleton)
    split_fused(skeleton, layouts_of(module))
    return skeleton


def _without_place(biased: Sequence[str], skeleton: PreTrainedModel) -> list[str]:
    return [name for name in biased if bias_of(skeleton.get_submodule(name)) is None]


def dense_layer(child: CompressedModule, plain: nn.Module, *, keep_bias: bool) -> nn.Module:
    """Return the layer of the architecture with the matrix that ``child`` stands for, and its bias if that is kept."""
    dtype = next(tensor.dtype for tensor in (*child.parameters(), *child.buffers()) if tensor.is_floating_point())
    with torch.no_grad():
        exact = copy.deepcopy(child).double()
        getattr(exact, "leader", exact).double()  # it comes along in the copy, but is no submodule
        weight, bias = exact.weight.to(dtype), bias_of(exact) if keep_bias else None
    if bias_of(plain) is not None and bias is None:
        bias = torch.zeros(child.out_features, dtype=dtype, device=weight.device)
    with torch.device("meta"):
        layer = _like(plain, child, bias)
    layer.weight = nn.Parameter(weight.T.contiguous() if isinstance(layer, Conv1D) else weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def _like(plain: nn.Module, child: CompressedModule, bias: Tensor | None) -> nn.Linear | Conv1D:
    if isinstance(plain, Conv1D):
        return Conv1D(child.out_features, child.in_features)
    return nn.Linear(child.in_features, child.out_features, bias=bias is not None)


def _add_zero_biases(dense: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Give the layers that were left dense the bias that the config now speaks of."""
    for name, plain in skeleton.named_modules():
        layer = dense.get_submodule(name)
        if isinstance(layer, nn.Linear) and layer.bias is None and bias_of(plain) is not None:
            zeros = torch.zeros(layer.out_features, dtype=layer.weight.dtype, device=layer.weight.device)
            layer.bias = nn.Parameter(zeros, requires_grad=False)

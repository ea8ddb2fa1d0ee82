"""The dense merge: every compressed layer as the plain layer of the architecture, holding the product of the factors.

Any runtime reads it, and it is not smaller. A centred basis gives layers a bias, which the architecture must have a place for.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_core.errors import ModelError
from lowrank_core.layers.base import CompressedModule
from lowrank_core.metrics import METRICS
from lowrank_core.models.experts import roll_experts, unroll_experts
from lowrank_core.models.gguf import become_plain
from lowrank_core.models.handle import bias_of
from lowrank_core.models.hf import compressed_modules

__all__ = ["merged"]


def merged(module: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model in its plain architecture; the products are computed in float64 and cast once.

    Raises:
        ModelError: a layer has a bias for which the architecture has no place, whatever its config says.
    """
    compressed = dict(compressed_modules(module))
    config, skeleton = _with_places_for_biases(module, compressed)
    # deepcopy takes a replaced layer from its memo, so that no factor is copied to be thrown away.
    memo: dict[int, object] = {id(child): _dense_layer(child, skeleton.get_submodule(name)) for name, child in compressed.items()}
    dense = copy.deepcopy(module, memo)
    _add_zero_biases(dense, skeleton)
    for model in (dense, skeleton):
        roll_experts(model)
    dense.config = config
    become_plain(dense)
    result, expected = ({name: tensor.shape for name, tensor in model.state_dict().items()} for model in (dense, skeleton))
    assert result == expected, sorted(result.items() ^ expected.items())[:3]
    return dense


def _with_places_for_biases(module: PreTrainedModel, compressed: dict[str, CompressedModule]) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Return a config under which the architecture has a bias wherever a compressed layer has one, and the empty model of it."""
    config = copy.deepcopy(module.config)
    skeleton = _empty(module, config)
    homeless = _without_place(compressed, skeleton)
    for flag in [name for name, value in config.to_dict().items() if value is False and name.endswith("bias")]:
        if homeless:
            changed = copy.deepcopy(config)
            setattr(changed, flag, True)
            other = _empty(module, changed)
            left = _without_place(compressed, other)
            if len(left) < len(homeless):
                config, skeleton, homeless = changed, other, left
    if homeless:
        plain = ", ".join(name for name, basis in METRICS.items() if not basis.centred)
        raise ModelError(
            f"dense: {type(module).__name__} has no place for the biases that a centred basis gave {len(homeless)} layers "
            f"(the first: {homeless[0]}). Export the compressed form, or compress with a basis that adds none: {plain}."
        )
    return config, skeleton


def _empty(module: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton = type(module)(copy.deepcopy(config))
    unroll_experts(skeleton)
    return skeleton


def _without_place(compressed: dict[str, CompressedModule], skeleton: PreTrainedModel) -> list[str]:
    return [name for name, child in compressed.items() if bias_of(child) is not None and bias_of(skeleton.get_submodule(name)) is None]


def _dense_layer(child: CompressedModule, plain: nn.Module) -> nn.Module:
    """Return the layer of the architecture with the matrix and the bias that ``child`` stands for."""
    dtype = next(tensor.dtype for tensor in child.state_dict().values() if tensor.is_floating_point())
    with torch.no_grad():
        exact = copy.deepcopy(child).double()
        getattr(exact, "leader", exact).double()  # it comes along in the copy, but is no submodule
        weight, bias = exact.weight.to(dtype), bias_of(exact)
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

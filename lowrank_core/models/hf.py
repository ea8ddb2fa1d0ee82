"""The compressed format as transformers sees it: after ``import lowrank_core.models``, ``from_pretrained`` reads it.

A compressed checkpoint is a usual one whose ``config.json`` says, under ``quantization_config``, which linear layers
were replaced and at which rank. transformers calls the quantizer below to swap them before it loads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_core.errors import ModelError
from lowrank_core.models.handle import bias_of, weight_of
from lowrank_core.models.lowrank_linear import LowRankLinear

__all__ = ["METHOD", "LowRankQuantizationConfig", "LowRankQuantizer", "mark_compressed", "replace_module"]

METHOD = "lowrank"


@register_quantization_config(METHOD)
class LowRankQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Layer name -> ``{"rank": r, "bias": has one}`` for each replaced layer, and how they came about (free text)."""

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Any] | None = None, **unused: Any) -> None:
        self.quant_method = METHOD
        self.layers = {name: dict(entry) for name, entry in layers.items()}
        self.provenance = dict(provenance or {})


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linear layers for ``LowRankLinear`` before the weights are read; nothing is quantised."""

    requires_calibration = True  # only checkpoints that are compressed already

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, entry in self.quantization_config.layers.items():
            try:
                old = model.get_submodule(name)
                d_out, d_in = weight_of(old).shape
            except AttributeError as error:
                raise ModelError(f"model: config.json names the compressed layer {name!r}, which this architecture has not.") from error
            rank, bias = entry.get("rank"), entry.get("bias")
            if type(rank) is not int or type(bias) is not bool or not 1 <= rank <= min(d_out, d_in):
                raise ModelError(f"model: config.json gives the compressed layer {name!r} no valid rank and bias. Export the model again.")
            with torch.device("meta"):
                new = LowRankLinear(d_in, d_out, rank, bias=bias)
            replace_module(model, name, new)
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at the dotted path ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def mark_compressed(model: PreTrainedModel, provenance: Mapping[str, Any]) -> None:
    """Write into the model's config which of its layers are low-rank, so that ``save_pretrained`` keeps it."""
    layers = {
        name: {"rank": child.rank, "bias": bias_of(child) is not None}
        for name, child in model.named_modules()
        if isinstance(child, LowRankLinear)
    }
    config = LowRankQuantizationConfig(layers, provenance)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config, pre_quantized=True)

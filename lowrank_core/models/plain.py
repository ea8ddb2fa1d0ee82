"""Models of the plain form, as their classes are built: two linear layers in place of one, named in the config.

The folder's own module is never run: the same class is built of transformers' architecture and ours (``layers.plain``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowrank_core.errors import ModelError
from lowrank_core.layers.factored import LowRankLinear
from lowrank_core.layers.plain import PlainFactors, WithFactors
from lowrank_core.models.unrolled import replace_module

__all__ = ["ARCHITECTURE", "architectures_of", "become_factored", "is_plain_form", "plain_class"]

ARCHITECTURE = "LowRankForCausalLM"
"""Class that ``architectures`` of a plain folder names; no registry has it, so that nothing takes the model for its dense architecture."""

_KEYS = ("lowrank_ranks", "lowrank_biases", "lowrank_unguarded", "auto_map")


class _Unguarded(WithFactors):
    """The same of a folder that another project wrote, without the empty tensors of ours."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        for child in self.modules():
            if isinstance(child, PlainFactors):
                del child.weight


def is_plain_form(config: PretrainedConfig) -> bool:
    """Return whether a config names layers that are two linear layers each."""
    return hasattr(config, _KEYS[0])


def architectures_of(config: PretrainedConfig) -> tuple[str, str]:
    """Return the names of the causal and of the base class that transformers has for a config.

    Raises:
        ModelError: it has none, or none of its own.
    """
    classes = [mapping.get(type(config), None) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel._model_mapping)]
    names = [getattr(found, "__name__", "") for found in classes]
    if not all(names) or not all(hasattr(transformers, name) for name in names):
        raise ModelError(
            f"plain: the model type {config.model_type} has no text model of its own in transformers, on which the plain form is built. "
            "Write the form compressed or dense."
        )
    return names[0], names[1]


def plain_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the causal class of a config with factors in it.

    Raises:
        ModelError: as ``architectures_of``; or the config names no factors.
    """
    ranks, biases = getattr(config, _KEYS[0], None), getattr(config, _KEYS[1], None)
    numbers = isinstance(ranks, Mapping) and all(type(rank) is int and rank > 0 for rank in ranks.values())
    if not numbers or not isinstance(biases, list) or not all(isinstance(name, str) for name in biases):
        raise ModelError("model: config.json doesn't say which layers are factors, or which have a bias. Export the model again.")
    mixin = _Unguarded if getattr(config, "lowrank_unguarded", False) else WithFactors
    made: type[PreTrainedModel] = type(ARCHITECTURE, (mixin, getattr(transformers, architectures_of(config)[0])), {})
    return made


def become_factored(module: PreTrainedModel) -> None:
    """Turn a model of the plain form into the same architecture with our low-rank layers, in place."""
    children: list[tuple[str, nn.Module]] = list(module.named_modules())
    for name, child in children:
        if isinstance(child, PlainFactors):
            up, down = child.up.weight, child.down.weight
            replace_module(module, name, LowRankLinear.from_factors(up, down, child.up.bias, like=up))
    holder: Any = module
    holder.__class__ = getattr(transformers, architectures_of(module.config)[0])
    for key in _KEYS:
        vars(module.config).pop(key, None)

"""Low-rank adapters on the factors themselves, through peft: what they learn is merged into the factors, whose size stays.

Each of B and A of W ~ B A gets an update of its own, as SVD-LLM does it (arXiv 2403.07378, §3.3): an adapter next to W as a whole
would have to stay next to it, since W plus the adapter has a larger rank.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import ConfigError
from lowrank_core.healing.base import Healer, Student, compressed_layers
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.stacked import StackedLinear

__all__ = ["LoraHealing"]


class LoraHealing(Healer):
    """Adapters of rank r on every factor that one layer alone reads; those that a stack shares, and the values of heads, stay."""

    name: ClassVar[str] = "lora"
    reference: ClassVar[str] = "arXiv 2106.09685"
    caution: ClassVar[float] = 0.2  # half of an adapter begins at zero, so that the other half seems to change nothing

    def student(self, module: PreTrainedModel, config: HealingConfig) -> Student:
        try:
            import peft
        except ImportError as error:
            raise ConfigError('LoRA needs peft: pip install "lowrank-studio[lora]". Or heal by distill.') from error
        shared = {
            layer.leader for layer in compressed_layers(module).values() if isinstance(layer, StackedLinear) and layer.leader is not layer
        }
        targets = [
            f"{name}.{part}"
            for name, layer in compressed_layers(module).items()
            for part, factor in layer.stored_factors()
            if _adaptable(layer, part, factor, shared)
        ]
        if not targets:
            raise ConfigError("no factor of this model can carry an adapter. Heal it by distill.")
        rank = config.lora_rank
        choice = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets, lora_dropout=0.0, bias="none")
        with warnings.catch_warnings():  # peft asks transformers for a name that is about to go
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: Any = peft.get_peft_model(module, choice)
        trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        return Student(wrapped.base_model.model, trained, lambda: wrapped.merge_and_unload())


def _adaptable(layer: CompressedModule, part: str, factor: object, shared: set[StackedLinear]) -> bool:
    # peft puts an adapted factor in place while its own layer runs: the followers of a stack would read the one without.
    alone = part != "down" or layer not in shared
    return alone and isinstance(factor, nn.Parameter) and factor.ndim == 2 and factor.numel() > 0

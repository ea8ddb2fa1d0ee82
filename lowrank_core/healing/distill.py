"""Training all factors towards the dense model's next-token distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lowrank_core.config.healing import HealingConfig
from lowrank_core.healing.base import Healer, Student, compressed_layers
from lowrank_core.healing.optimizers import soap

__all__ = ["Distillation", "trained_factors"]


def trained_factors(module: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Have the factors and biases of all compressed layers trained, and return them; one that a stack shares is there once.

    Raises:
        ConfigError: there are none.
    """
    result: dict[str, nn.Parameter] = {}
    for name, layer in compressed_layers(module).items():
        for part, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(True)
            result[f"{name}.{part}"] = parameter
    return result


class Distillation(Healer):
    """τ² KL(dense ‖ compressed) + α CE, all factors and their biases trained together."""

    name: ClassVar[str] = "distill"
    reference: ClassVar[str] = "arXiv 1503.02531"
    caution: ClassVar[float] = 4.0  # steps of SOAP go less astray than those of Adam, for which rates are measured

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        return soap(parameters)

    def student(self, module: PreTrainedModel, config: HealingConfig) -> Student:
        return Student(module, trained_factors(module), lambda: module)

"""The contract of a way to heal: which numbers of a compressed model are trained, by which loss, and how they end up in its factors.

Notation::

    z_d, z_c   logits of the dense and of the compressed model
    τ, α       temperature, weight of the cross-entropy
    h_b        hidden states (B, T, d) after block b
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lowrank_core.config.healing import HEALER_LABELS, HealingConfig
from lowrank_core.errors import ConfigError
from lowrank_core.healing.optimizers import adam
from lowrank_core.layers.base import CompressedModule

__all__ = ["Healer", "Student", "compressed_layers", "distillation_loss"]


@dataclass(frozen=True)
class Student:
    """A model in training.

    Attributes:
        module: what runs; it may hold more than the model will in the end.
        trained: name -> what the optimiser changes; nothing else requires a gradient.
        fold: puts what was trained into the factors and returns the model, of the size that it had. Called once, in the end.
    """

    module: PreTrainedModel
    trained: Mapping[str, nn.Parameter]
    fold: Callable[[], PreTrainedModel]


class Healer(ABC):
    """One way to heal.

    Attributes:
        name: in ``HEALER_LABELS``; reference: where it is from.
        caution: by which a measured rate is multiplied.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    caution: ClassVar[float] = 1.0

    @property
    def label(self) -> str:
        return HEALER_LABELS[self.name]

    @abstractmethod
    def student(self, module: PreTrainedModel, config: HealingConfig) -> Student:
        """Return ``module``, a compressed model of the caller's that this may change, ready to be trained.

        Raises:
            ConfigError: it has nothing that can be trained so.
        """

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Return what changes the parameters; its learning rate is set before every step."""
        return adam(parameters)

    def loss(self, student: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, config: HealingConfig) -> Tensor:
        """Return the loss of one batch of windows (B, T), a mean over tokens."""
        with torch.no_grad():
            target = dense(input_ids=ids, use_cache=False).logits[:, :-1]
        result = student(input_ids=ids, use_cache=False).logits[:, :-1]
        return distillation_loss(result.float(), target.float(), ids[:, 1:], config.temperature, config.cross_entropy)


def distillation_loss(result: Tensor, target: Tensor, tokens: Tensor, temperature: float, cross_entropy: float) -> Tensor:
    """Return τ² KL(softmax(z_d / τ) ‖ softmax(z_c / τ)) + α CE, the mean over tokens, in nats (Hinton et al., arXiv 1503.02531).

    Args:
        found, target: z_c and z_d (B, T, vocabulary).
        tokens: (B, T), what the text goes on with.
    """
    log_p = torch.log_softmax(target / temperature, dim=-1)
    log_q = torch.log_softmax(result / temperature, dim=-1)
    divergence = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    loss = temperature**2 * divergence
    if cross_entropy:
        loss = loss + cross_entropy * nn.functional.cross_entropy(result.flatten(0, 1), tokens.flatten())
    return loss


def compressed_layers(module: nn.Module) -> dict[str, CompressedModule]:
    """Return the compressed layers of a model by their names.

    Raises:
        ConfigError: there is none, or some are quantised, which can't be trained.
    """
    result = {name: child for name, child in module.named_modules() if isinstance(child, CompressedModule)}
    if not result:
        raise ConfigError("there is nothing to heal: this model has no compressed layer. Give a compressed model.")
    if any(layer.grid is not None for layer in result.values()):
        raise ConfigError("quantised factors can't be trained. Heal the model before it is quantised.")
    return result

"""What the user chose for a healing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowrank_core.config import check_choice, check_min
from lowrank_core.errors import ConfigError

__all__ = ["CRITERIA", "HEALER_LABELS", "HealingConfig"]

HEALER_LABELS = {
    "distill": "Distillation of the factors",
    "blockwise": "Block-wise refinement",
    "diagonal": "Diagonal post-training (the paper's)",
    "lora": "LoRA on the factors",
}
"""Name -> what people call it; ``healing.healers`` has one of each."""

CRITERIA = ("objective", "kl", "perplexity")
"""What validation may choose by: KL + α NLL, as distillation is trained, or one of the two alone."""


@dataclass(frozen=True)
class HealingConfig:
    """How a compressed model is trained towards the dense one.

    Attributes:
        method: name in ``HEALER_LABELS``.
        steps: of the optimiser, at most.
        batch_size: windows in a step.
        learning_rate: largest, after the warm-up; None measures one (``rates``).
        warmup: fraction of the steps in which the rate rises; from there it falls as a cosine to 0.
        temperature: τ of the distributions that are compared: τ² KL(dense^(1/τ) ‖ compressed^(1/τ)).
        cross_entropy: α, weight of the loss on the text itself next to the divergence. A little of it steers what the factors can't
            hold towards what the text needs; with much of it they learn the text, and leave the dense model.
        criterion: what validation chooses by, one of ``CRITERIA``: what is kept is never worse in it than the start was.
        validate_every: steps between two validations, which are also checkpoints.
        patience: validations without a better one after which training ends.
        train_windows: of the text's calibration split, at most, drawn at random.
        lora_rank: r of the adapters, for ``lora``.
        seed: of the draw of windows, their order, and initial adapters.
    """

    method: str = "distill"
    steps: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    warmup: float = 0.05
    temperature: float = 1.0
    cross_entropy: float = 0.02
    criterion: str = "objective"
    validate_every: int = 20
    patience: int = 10
    train_windows: int = 4096
    lora_rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("healing", self.method, HEALER_LABELS)
        check_choice("criterion", self.criterion, CRITERIA)
        names = ("steps", "batch_size", "validate_every", "patience", "train_windows", "lora_rank")
        check_min(1, **{name: getattr(self, name) for name in names})
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"the learning rate must be a positive number, got {self.learning_rate:g}. Try 1e-3.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"the temperature must be a positive number, got {self.temperature:g}. Try 1.")
        if not 0 <= self.cross_entropy < math.inf:
            raise ConfigError(f"the weight of the cross-entropy must be a number from 0 up, got {self.cross_entropy:g}. Try 0.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"the warm-up is a fraction of the steps, in [0, 1); got {self.warmup:g}. Try 0.05.")
        check_min(0, seed=self.seed)

    def figure(self, kl: float, nll: float) -> float:
        """Return what validation chooses by, in nats per token: less is better."""
        return {"objective": kl + self.cross_entropy * nll, "kl": kl, "perplexity": nll}[self.criterion]

    def rate_at(self, step: int) -> float:
        """Return the fraction of the largest rate in ``step``, from 1: a line up, then a cosine to 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step <= rise:
            return step / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

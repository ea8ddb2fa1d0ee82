"""Settings of a healing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowrank_core.config.options import check_options, option
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
"""Validation criteria: KL + α NLL, as distillation is trained, or one of the two alone."""


@dataclass(frozen=True)
class HealingConfig:
    """Training of a compressed model towards the dense one."""

    method: str = option("distill", "what is trained", label="Method", choices=HEALER_LABELS)
    steps: int = option(200, "of the optimiser, at most", label="Steps, at most", minimum=1)
    batch_size: int = option(8, "windows in a step", label="Windows in a step", minimum=1)
    learning_rate: float | None = option(
        None,
        "largest, after the warm-up",
        label="Learning rate",
        fallback="measured from how sensitive the model is",
    )
    warmup: float = option(0.05, "fraction of the steps in which the rate rises; from there it falls as a cosine to 0", label="Warm-up")
    temperature: float = option(1.0, "τ of the distributions that are compared: τ² KL(dense^(1/τ) ‖ compressed^(1/τ))", label="Temperature")
    cross_entropy: float = option(
        0.02,
        "α, weight of the loss on the text itself next to the divergence: a little helps the perplexity, with more the model learns the "
        "text instead",
        label="Weight of the text's own loss",
        step=0.01,
    )
    criterion: str = option(
        "objective", "what validation chooses by: KL + α NLL as it is trained, or one of the two alone", label="Criterion", choices=CRITERIA
    )
    validate_every: int = option(20, "steps between two validations, which are also checkpoints", label="Validate every", minimum=1)
    patience: int = option(10, "validations without a better one after which training ends", label="Patience", minimum=1)
    train_windows: int = option(4096, "of the text's calibration split, at most, drawn at random", label="Training windows", minimum=1)
    lora_rank: int = option(8, "of the adapters, for lora", label="LoRA rank", minimum=1)
    seed: int = option(
        0, "of the draw of windows, their order, and initial adapters", label="Seed of the healing", flag="heal-seed", minimum=0
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"the learning rate must be a positive number, got {self.learning_rate:g}. Try 1e-3.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"the temperature must be a positive number, got {self.temperature:g}. Try 1.")
        if not 0 <= self.cross_entropy < math.inf:
            raise ConfigError(f"the weight of the cross-entropy must be a number from 0 up, got {self.cross_entropy:g}. Try 0.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"the warm-up is a fraction of the steps, in [0, 1); got {self.warmup:g}. Try 0.05.")

    def figure(self, kl: float, nll: float) -> float:
        """Return what validation chooses by, in nats per token: less is better."""
        return {"objective": kl + self.cross_entropy * nll, "kl": kl, "perplexity": nll}[self.criterion]

    def rate_at(self, step: int) -> float:
        """Return the fraction of the largest rate in ``step``, from 1: a line up, then a cosine to 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step <= rise:
            return step / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

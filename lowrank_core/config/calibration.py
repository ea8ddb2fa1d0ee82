"""How statistics are measured."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.checks import check_choice, check_min

__all__ = ["GROUP_WEIGHTS", "ROBUST_RULES", "TOKENS_PER_DIMENSION", "CalibrationConfig"]

GROUP_WEIGHTS = ("equal", "dof")
ROBUST_RULES = ("none", "trimmed", "downweighted")

TOKENS_PER_DIMENSION = 8
"""Below this many tokens per input dimension a covariance says little about small eigenvalues (METHODS §1)."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How feature statistics are pooled (Bolaco, Eq. 4).

    Attributes:
        group_size: consecutive windows in a group of the pooled covariance; a remainder forms its own group.
        group_weights: ``equal`` (the paper) or ``dof`` (by degrees of freedom).
        batch_size: windows in a forward pass; changes speed and memory, and results only by rounding.
        robust: ``none``; ``trimmed`` leaves the tenth of the groups with the largest and with the smallest trace out of the pooled
            covariance; ``downweighted`` gives a token beyond 3 median norms of its window the weight (3 · median / norm)².
        gradient_windows: windows that output gradients are measured on, from the first; all if there are fewer.
        gradient_seed: of the labels that are drawn from the model for the gradients.
    """

    group_size: int = 32
    group_weights: str = "equal"
    batch_size: int = 8
    robust: str = "none"
    gradient_windows: int = 256
    gradient_seed: int = 0

    def __post_init__(self) -> None:
        check_min(1, group_size=self.group_size, batch_size=self.batch_size, gradient_windows=self.gradient_windows)
        check_min(0, gradient_seed=self.gradient_seed)
        check_choice("group weights", self.group_weights, GROUP_WEIGHTS)
        check_choice("robust", self.robust, ROBUST_RULES)

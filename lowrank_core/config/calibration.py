"""Settings of calibration."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.options import check_options, option

__all__ = ["CALIBRATION_MATRICES", "GROUP_WEIGHTS", "ROBUST_RULES", "TOKENS_PER_DIMENSION", "CalibrationConfig"]

GROUP_WEIGHTS = ("equal", "dof")
ROBUST_RULES = ("none", "trimmed", "downweighted")
_PRECISIONS = ("auto", "float32", "bfloat16")

TOKENS_PER_DIMENSION = 8
"""Below this many tokens per input dimension a covariance says little about small eigenvalues."""

CALIBRATION_MATRICES = 5
"""Float64 matrices that an input holds at most while its block is calibrated: group, total, pool, and two on the way out."""


@dataclass(frozen=True)
class CalibrationConfig:
    """Pooling of feature statistics (Bolaco, Eq. 4)."""

    group_size: int = option(
        32,
        "consecutive windows in a group of the pooled covariance; a remainder forms its own group",
        label="Group size (windows)",
        minimum=1,
    )
    group_weights: str = option("equal", "equal: as in the paper; dof: by degrees of freedom", label="Group weights", choices=GROUP_WEIGHTS)
    batch_size: int = option(
        8, "windows in a forward pass; changes speed and memory, and results only by rounding", label="Windows in a forward pass", minimum=1
    )
    robust: str = option(
        "none",
        "trimmed: without the tenth of the groups with the largest, and with the smallest, trace; downweighted: a token beyond 3 median "
        "norms of its window has the weight (3 · median / norm)²",
        label="Robust pooling",
        choices=ROBUST_RULES,
    )
    gradient_windows: int = option(
        256, "windows that output gradients are measured on, from the first; all if there are fewer", label="Gradient windows", minimum=1
    )
    gradient_seed: int = option(0, "of the labels that are drawn from the model for the gradients", label="Gradient seed", minimum=0)

    precision: str = option(
        "auto",
        "of matrix products in passes of calibration and gradients of a float32 model on a CPU; auto: bfloat16 where the processor "
        "has instructions for it; sums, moments, the fit and all that is evaluated stay in float32",
        label="Precision of products",
        choices=_PRECISIONS,
    )

    def __post_init__(self) -> None:
        check_options(self)

"""Settings of top directions."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.options import check_options, option

__all__ = ["SIDES", "DirectionsConfig"]

SIDES = ("input", "output")

_MAX = 32  # directions, and tokens of each: an answer is for reading


@dataclass(frozen=True)
class DirectionsConfig:
    """Directions to read of the layer ``module`` (its dotted name)."""

    module: str
    side: str = option("input", "of the module that the directions are read at", choices=SIDES)
    directions: int = option(6, "how many, the largest eigenvalue first", label="Directions", minimum=1, maximum=_MAX)
    tokens: int = option(6, "different tokens for each direction", label="Tokens of each", minimum=1, maximum=_MAX)
    windows: int = option(32, "calibration windows to look through, at most", label="Windows, at most", minimum=1, step=8)
    batch_size: int = option(8, "windows in a forward pass", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

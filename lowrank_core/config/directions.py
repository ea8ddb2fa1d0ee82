"""What the user chose of a module's top directions."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.errors import ConfigError

__all__ = ["SIDES", "DirectionsConfig"]

SIDES = ("input", "output")

_MAX = 32  # directions, and tokens of each: an answer is for reading


@dataclass(frozen=True)
class DirectionsConfig:
    """Which directions to read.

    Attributes:
        module: dotted name of a compressible layer.
        side: of the module's ``input`` or ``output``.
        directions: how many, the largest eigenvalue first.
        tokens: how many different tokens for each.
        windows: calibration windows to look through, at most.
        batch_size: windows in a forward pass.
    """

    module: str
    side: str = "input"
    directions: int = 6
    tokens: int = 6
    windows: int = 32
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ConfigError(f"side must be input or output, got {self.side!r}.")
        for name, value in (("directions", self.directions), ("tokens", self.tokens)):
            if not 1 <= value <= _MAX:
                raise ConfigError(f"{name} must lie between 1 and {_MAX}, got {value}.")
        if self.windows < 1 or self.batch_size < 1:
            raise ConfigError(f"windows and batch size must be at least 1, got {self.windows} and {self.batch_size}.")

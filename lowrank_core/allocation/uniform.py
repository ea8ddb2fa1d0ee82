"""The same kept fraction everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.allocation.projection import ByMultipliers
from lowrank_core.parameters import Unit

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(ByMultipliers):
    """Every unit keeps the same fraction of its parameters."""

    name: str = "uniform"
    label: str = "Uniform"
    reference: str = "the usual baseline"
    neutral = True

    def multipliers(self, units: Sequence[Unit]) -> dict[str, float]:
        return {unit.name: 1.0 for unit in units}

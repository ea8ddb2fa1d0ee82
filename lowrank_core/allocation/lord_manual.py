"""The fixed ratios of the LoRD baseline that the paper compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.allocation.base import module_group
from lowrank_core.allocation.projection import ByMultipliers
from lowrank_core.parameters import Unit

__all__ = ["LordManual"]

_KEPT_QK, _KEPT_OTHER = 0.7, 0.8  # kept fractions in the paper's published code


@dataclass(frozen=True)
class LordManual(ByMultipliers):
    """q and k keep 0.7 for each 0.8 that the other types keep (scaled together to the budget)."""

    name: str = "lord_manual"
    label: str = "LoRD, fixed ratios"
    reference: str = "baseline of Bolaco, arXiv 2405.10616, with the ratios of its published code"

    def multipliers(self, units: Sequence[Unit]) -> dict[str, float]:
        return {unit.name: _KEPT_QK if module_group(unit.kind) == "qk" else _KEPT_OTHER for unit in units}

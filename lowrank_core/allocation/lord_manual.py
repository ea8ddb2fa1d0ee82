"""The fixed ratios of the LoRD baseline that the paper compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.accounting import MatrixShape
from lowrank_core.allocation.base import module_group

__all__ = ["LORD_MANUAL", "LordManual"]

_KEPT_QK, _KEPT_OTHER = 0.7, 0.8  # kept fractions in the paper's published code


@dataclass(frozen=True)
class LordManual:
    """q and k keep 0.7 for each 0.8 that the other types keep (scaled together to the budget)."""

    name: str = "lord_manual"
    label: str = "LoRD, fixed by hand"
    reference: str = "baseline of Bolaco, arXiv 2405.10616, with the ratios of its published code"

    def multipliers(self, matrices: Sequence[MatrixShape]) -> dict[str, float]:
        return {m.name: _KEPT_QK if module_group(m.kind) == "qk" else _KEPT_OTHER for m in matrices}


LORD_MANUAL = LordManual()

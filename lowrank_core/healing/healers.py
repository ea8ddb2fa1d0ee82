"""The ways to heal, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lowrank_core.healing.base import Healer
from lowrank_core.healing.blockwise import BlockwiseRefinement
from lowrank_core.healing.diagonal import DiagonalPostTraining
from lowrank_core.healing.distill import Distillation
from lowrank_core.healing.lora import LoraHealing

__all__ = ["HEALERS"]

HEALERS: Mapping[str, Healer] = MappingProxyType(
    {healer.name: healer for healer in (Distillation(), BlockwiseRefinement(), DiagonalPostTraining(), LoraHealing())}
)

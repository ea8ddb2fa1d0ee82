"""Everything that a run is made with."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_core.config.calibration import CalibrationConfig
from lowrank_core.config.search import SearchConfig
from lowrank_core.config.sources import ModelSource, TextConfig

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that a worker needs to repeat a run; ``search`` is None for a run that only analyses."""

    model: ModelSource = field(default_factory=ModelSource)
    text: TextConfig = field(default_factory=TextConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchConfig | None = None

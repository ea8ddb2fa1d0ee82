"""Speed and peak memory of models, warm, two models in alternation."""

from lowrank_core.config.speed import SpeedConfig
from lowrank_core.runs.measurements import MemoryReport, SpeedComparison, SpeedReport, Spread
from lowrank_core.speed.comparison import compare_speed
from lowrank_core.speed.memory import measure_memory
from lowrank_core.speed.timing import measure_speed, timed_generation
from lowrank_core.speed.turns import in_turns

__all__ = [
    "MemoryReport",
    "SpeedComparison",
    "SpeedConfig",
    "SpeedReport",
    "Spread",
    "compare_speed",
    "in_turns",
    "measure_memory",
    "measure_speed",
    "timed_generation",
]

"""Speed and peak memory of models, warm, two models in alternation."""

from lowrank_core.config.speed import SpeedConfig
from lowrank_core.speed.comparison import SpeedComparison, compare_speed
from lowrank_core.speed.memory import MemoryReport, measure_memory
from lowrank_core.speed.timing import SpeedReport, measure_speed, timed_generation
from lowrank_core.speed.turns import Spread, in_turns

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

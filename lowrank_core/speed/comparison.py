"""Two models in turns: how much faster, and how much smaller, one is than the other."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lowrank_core.config import ModelSource
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.models import ModelHandle
from lowrank_core.speed.memory import MemoryReport, measure_memory
from lowrank_core.speed.timing import Clock, SpeedReport, report_of, timed_in_turns
from lowrank_core.speed.turns import Spread
from lowrank_core.types import Progress

__all__ = ["SpeedComparison", "compare_speed"]


@dataclass(frozen=True)
class SpeedComparison:
    """A dense and a compressed model, round by round.

    Attributes:
        dense, compressed: each by itself.
        prefill_speedup, decode_speedup, first_token_speedup: time of the dense model over that of the compressed one in the same round;
            above 1 the compressed one is faster.
    """

    dense: SpeedReport
    compressed: SpeedReport
    prefill_speedup: Spread
    decode_speedup: Spread
    first_token_speedup: Spread

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory while running, compressed over dense; None where it was not measured."""
        ours, theirs = self.compressed.memory, self.dense.memory
        if ours is None or theirs is None or ours.running is None or not theirs.running:
            return None
        return ours.running / theirs.running

    def to_mapping(self) -> dict[str, object]:
        return {
            "dense": self.dense.to_mapping(),
            "compressed": self.compressed.to_mapping(),
            "prefill_speedup": self.prefill_speedup.to_mapping(),
            "decode_speedup": self.decode_speedup.to_mapping(),
            "first_token_speedup": self.first_token_speedup.to_mapping(),
            "memory_ratio": self.memory_ratio,
        }


def _memories(dense: ModelHandle, sources: tuple[ModelSource, ModelSource], config: SpeedConfig) -> tuple[MemoryReport, MemoryReport]:
    """Measure both in fresh processes; the dense model there must be the one that is timed here."""
    return measure_memory(sources[0], config, fingerprint=dense.fingerprint), measure_memory(sources[1], config)


def compare_speed(
    dense: ModelHandle,
    compressed: ModelHandle,
    config: SpeedConfig,
    *,
    sources: tuple[ModelSource, ModelSource] | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> SpeedComparison:
    """Measure both models on the same prompts, in turns, who goes first changing with every round.

    Args:
        sources: where fresh processes can load the dense and the compressed model, to measure their memory; None leaves that out.
        progress: is reported after each generation how many are done, and of how many.

    Raises:
        ConfigError, ModelError: as ``measure_speed``.
    """
    handles = (dense, compressed)
    for handle in handles:
        config.check_fits(handle)
    memories = (None, None) if sources is None else _memories(dense, sources, config)
    timings = timed_in_turns(handles, config, clock, progress)
    reports = [report_of(*each) for each in zip(handles, (config, config), timings, memories, strict=True)]
    rounds = list(zip(*timings, strict=True))
    return SpeedComparison(
        dense=reports[0],
        compressed=reports[1],
        prefill_speedup=Spread.of(theirs.prefill / ours.prefill for theirs, ours in rounds),
        decode_speedup=Spread.of(theirs.decode / ours.decode for theirs, ours in rounds),
        first_token_speedup=Spread.of(theirs.first_token / ours.first_token for theirs, ours in rounds),
    )

"""Two models in turns: how much faster, and how much smaller, one is than the other."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lowrank_core.config import ModelSource
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.models import ModelHandle
from lowrank_core.runs.measurements import MemoryReport, SpeedComparison, SpeedReport, Spread
from lowrank_core.speed.memory import measure_memory
from lowrank_core.speed.timing import Clock, Timing, report_of, timed_in_turns
from lowrank_core.types import Progress

__all__ = ["compare_speed", "compared"]


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
    return compared(reports, timings)


def compared(reports: Sequence[SpeedReport], timings: Sequence[Sequence[Timing]]) -> SpeedComparison:
    """Return the comparison of a dense and a compressed model, whose rounds are paired."""
    rounds = list(zip(*timings, strict=True))
    return SpeedComparison(
        dense=reports[0],
        compressed=reports[1],
        prefill_speedup=Spread.of(theirs.prefill / ours.prefill for theirs, ours in rounds),
        decode_speedup=Spread.of(theirs.decode / ours.decode for theirs, ours in rounds),
        first_token_speedup=Spread.of(theirs.first_token / ours.first_token for theirs, ours in rounds),
    )

"""Measured speed and memory, the dense model next to each compressed model."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.comparison import comparisons
from lowrank_core.studio.compare.comparison_chart import speedup_figure
from lowrank_core.studio.compare.measured_speed import Speed, speed_numbers, speed_spec, speeds, speedup_table
from lowrank_core.studio.report.blocks import Block, Note, Prose, Section, drawn

__all__ = ["speed_section"]


def speed_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    bodies = results(run)
    result = speeds(bodies, trials_of(run))
    blocks: list[Block] = []
    if result:
        blocks = [_speedups(result), *(block for number, speed in enumerate(result, 1) for block in _figures(speed, number))]
    elif comparisons(bodies):
        blocks = [Note("missing", "No model was timed: fewer parameters are not always faster. The Compare page does it.")]
    return Section("speed", "Speed and memory", "Is the compressed model faster, and does it need less memory?", tuple(blocks))


def _speedups(result: Sequence[Speed]) -> Block:
    return drawn(
        speedup_figure(speedup_table(result)),
        speed_numbers(result),
        name="speedups",
        title="Times as fast as the dense model, in the same rounds",
        how="right of the dotted line the compressed model is faster; whiskers reach from the slowest round to the fastest.",
        alt="Dots with ranges: how many times faster each model reads, writes and begins; the tables below have the numbers",
        protocol=" ".join(f"{protocol}." for protocol in dict.fromkeys(speed.protocol for speed in result)),
    )


def _figures(speed: Speed, number: int) -> tuple[Block, Block]:
    rows = speed_spec(speed, number)
    return rows, Prose(f"Memory of {speed.name}: {speed.memory}." if speed.memory else f"Memory of {speed.name} was not measured.")

"""Report section: measured speed and memory."""

from __future__ import annotations

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.comparison import comparisons
from lowrank_core.studio.compare.comparison_chart import speedup_chart
from lowrank_core.studio.compare.measured_speed import Speed, speed_spec, speeds
from lowrank_core.studio.report.blocks import Block, Note, Prose, Section

__all__ = ["speed_section"]


def speed_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    bodies = results(run)
    result = speeds(bodies, trials_of(run))
    blocks: list[Block] = []
    if result:
        blocks = [speedup_chart(result), *(block for number, speed in enumerate(result, 1) for block in _figures(speed, number))]
    elif comparisons(bodies):
        blocks = [Note("missing", "No model was timed: fewer parameters are not always faster. Measure it on the Compare page.")]
    return Section("speed", "Speed and memory", "Speed and memory of the compressed models.", tuple(blocks))


def _figures(speed: Speed, number: int) -> tuple[Block, Block]:
    rows = speed_spec(speed, number)
    return rows, Prose(f"Memory of {speed.name}: {speed.memory}." if speed.memory else f"Memory of {speed.name} was not measured.")

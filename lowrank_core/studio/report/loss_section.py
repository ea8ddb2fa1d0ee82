"""Report section: the best measured model by window and by position."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.comparison import Comparison, comparisons
from lowrank_core.studio.compare.loss_details import window_table
from lowrank_core.studio.compare.loss_details_chart import position_chart, window_charts
from lowrank_core.studio.report.blocks import Block, Prose, Section

__all__ = ["closely_section"]


def closely_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    result = comparisons(results(run), trials_of(run))
    shown = _shown(result)
    blocks: list[Block] = []
    if shown is not None and (view := window_table(shown)) is not None:
        blocks = [Prose(f"{shown.name}: {view.words}"), *(window_charts(shown) or ())]
    if shown is not None and (positions := position_chart(shown)) is not None:
        blocks.append(positions)
    return Section("closely", "Diagnostics of one model", "Distribution of the loss over windows and positions.", tuple(blocks))


def _shown(result: Sequence[Comparison]) -> Comparison | None:
    """Return the searched one-shot model of lowest perplexity, else the lowest of all."""
    searched = [comparison for comparison in result if not comparison.given and comparison.form == "one-shot"]
    return min(searched or result, key=lambda comparison: comparison.perplexity, default=None)

"""The best measured model in detail: window by window, and by position in the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.comparison import Comparison, comparisons
from lowrank_core.studio.compare.loss_details import position_table, window_table
from lowrank_core.studio.compare.loss_details_chart import histogram_figure, position_figure, scatter_figure
from lowrank_core.studio.report.blocks import Block, Prose, Section, drawn
from lowrank_core.studio.shared.summary import protocol_of

__all__ = ["closely_section"]


def closely_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    result = comparisons(results(run), trials_of(run))
    shown = _shown(result)
    blocks = () if shown is None else (*_windows(shown), *_positions(shown))
    return Section("closely", "One model closely", "Is the loss spread over all of the text, or is some of it broken?", blocks)


def _shown(result: Sequence[Comparison]) -> Comparison | None:
    """Return the searched model of least perplexity as it came out of the compression, else the least of all."""
    searched = [comparison for comparison in result if not comparison.given and comparison.form == "one-shot"]
    return min(searched or result, key=lambda comparison: comparison.perplexity, default=None)


def _windows(shown: Comparison) -> Iterator[Block]:
    view = window_table(shown)
    if view is None:
        return
    protocol = f"{protocol_of(shown)}."
    yield Prose(f"{shown.name}: {view.words}")
    yield drawn(
        scatter_figure(view),
        view.frame,
        name="window-scatter",
        title=f"Each window: the dense model against {shown.name}",
        how="above the diagonal the compressed model predicts worse (orange), below it better (blue).",
        alt=f"Loss of {shown.name} over that of the dense model, a dot for each test window",
        protocol=protocol,
    )
    yield drawn(
        histogram_figure(view),
        view.frame[["window", "difference"]],
        name="window-histogram",
        title="How the differences are spread",
        how="a narrow heap next to zero is a small loss everywhere; a long tail is text that the compression broke.",
        alt=f"Histogram of the loss of {shown.name} less that of the dense model over test windows",
        protocol=protocol,
    )


def _positions(shown: Comparison) -> Iterator[Block]:
    result = position_table(shown)
    if result.empty:
        return
    yield drawn(
        position_figure(result),
        result,
        name="positions",
        title=f"What {shown.name} loses, by the tokens of context",
        how="a line that rises says that the compressed model makes less of a long context; the first tokens are few, so noisy.",
        alt=f"KL divergence and extra loss of {shown.name} by position in the context",
        protocol=f"{protocol_of(shown)}.",
    )

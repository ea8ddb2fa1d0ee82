"""Report section: quality on a second text."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.comparison import comparisons, other_texts
from lowrank_core.studio.compare.comparison_chart import ratio_chart
from lowrank_core.studio.compare.second_text import OtherText, other_text, other_text_spec
from lowrank_core.studio.report.blocks import Block, Note, Prose, Section

__all__ = ["second_text_section"]


def second_text_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    bodies, trials = results(run), trials_of(run)
    own = comparisons(bodies, trials)
    views = [view for result in other_texts(bodies, trials).values() if (view := other_text(own, result)) is not None]
    blocks: list[Block] = [block for number, view in enumerate(views, 1) for block in _told(view, number)]
    if own and not views:
        blocks = [
            Note(
                "missing", "No second text was measured, so the quality on other kinds of text is unknown. Measure one on the Compare page."
            )
        ]
    return Section("second-text", "A second text", "Quality on text of another kind.", tuple(blocks))


def _told(view: OtherText, number: int) -> Iterator[Block]:
    yield Prose(view.words)
    yield ratio_chart(view, number)
    yield other_text_spec(view, number)

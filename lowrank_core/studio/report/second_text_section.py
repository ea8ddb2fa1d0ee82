"""A second text: whether what was calibrated on one text holds on another."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.comparison import comparisons, other_texts
from lowrank_core.studio.compare.comparison_chart import ratio_figure
from lowrank_core.studio.compare.second_text import OtherText, other_text
from lowrank_core.studio.report.blocks import Block, Note, Prose, Section, drawn, table, text, value

__all__ = ["second_text_section"]

_RATIO = "Compressed over original; 1 is no loss."


def second_text_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    bodies, trials = results(run), trials_of(run)
    own = comparisons(bodies, trials)
    views = [view for result in other_texts(bodies, trials).values() if (view := other_text(own, result)) is not None]
    blocks: list[Block] = [block for number, view in enumerate(views, 1) for block in _told(view, number)]
    if own and not views:
        blocks = [Note("missing", "No second text was measured: whether this holds on other kinds of text is not known. Compare does it.")]
    return Section("second-text", "A second text", "Does what was calibrated on one text hold on another?", tuple(blocks))


def _told(view: OtherText, number: int) -> Iterator[Block]:
    own, name = view.own or "the run's text", f"second-text-{number}"
    protocol = f"{view.own_protocol or f'On {own} not measured'}. {view.other_protocol}."
    yield Prose(view.words)
    yield drawn(
        ratio_figure(view.frame, own, view.other),
        view.frame,
        name=name,
        title=f"Perplexity over the dense model's: {own} and {view.other}",
        how="two dots a model, one for each text; the longer the line between them, the more the compression fits its own text alone. "
        "Whiskers are 95 % intervals, paired by window.",
        alt="Two dots for each model: its perplexity over the dense model's on both texts; the table below has the numbers",
        protocol=protocol,
    )
    columns = (
        text("name", "Model"),
        value("own_ratio", f"Ratio on {own}", 4, _RATIO),
        value("other_ratio", f"Ratio on {view.other}", 4, _RATIO),
        value("own", f"Perplexity, {own}", 5),
        value("own_dense", "of the dense model", 5),
        value("other", f"Perplexity, {view.other}", 5),
        value("other_dense", "of the dense model", 5),
        value("kl_own", f"KL, {own} (nats per token)"),
        value("kl_other", f"KL, {view.other} (nats per token)"),
    )
    yield table(view.frame, columns, caption=f"Every model on both texts. {protocol}", file=f"{name}-models")

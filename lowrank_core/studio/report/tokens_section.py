"""Report section: token-level losses."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import trials_of
from lowrank_core.studio.compare.token_losses import TokenStrip, strips, worst_spec
from lowrank_core.studio.compare.token_losses_chart import strip_html
from lowrank_core.studio.report.blocks import Block, Folded, Section, Strip

__all__ = ["tokens_section"]

_WORST = 10


def tokens_section(run: Run) -> Section:
    """Raises: RunError: an answer of the worker is damaged."""
    result = strips(results(run), trials_of(run))
    blocks = tuple(block for number, strip in enumerate(result, 1) for block in _told(strip, number))
    return Section("tokens", "Token by token", "Where in a text does a compressed model predict worse than the dense model?", blocks)


def _told(strip: TokenStrip, number: int) -> Iterator[Block]:
    words = f"Coloured by the extra loss of each token over the dense model. {strip.words}"
    yield Strip(strip.name, words, Markup(strip_html(strip)), strip.protocol)
    worst = worst_spec(strip, _WORST, number)
    yield Folded(f"The {len(worst.frame)} tokens with the largest extra loss of {strip.name}", (worst,))

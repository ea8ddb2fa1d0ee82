"""Blocks of a report: frozen values in words, laid out by the template.

Numbers become words here (a missing one a dash), and tables become CSV links; escaping is left to the template.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
from markupsafe import Markup

from lowrank_core.studio.shared.chart_style import Chart
from lowrank_core.studio.shared.spreadsheet import csv_of
from lowrank_core.studio.shared.table import Metrics, Table

__all__ = ["Block", "Code", "Download", "Facts", "Folded", "Note", "Prose", "Section", "Strip", "csv_link", "metrics_in", "json_link"]


@dataclass(frozen=True)
class Download:
    """A file inside the page, as a data link."""

    block: ClassVar[str] = "download"
    label: str
    file: str
    link: str


def _link(body: str, media: str, label: str, file: str) -> Download:
    encoded = base64.b64encode(body.encode("utf-8")).decode("ascii")
    return Download(label, re.sub(r"[^\w.-]+", "-", file), f"data:{media};base64,{encoded}")


def csv_link(frame: pd.DataFrame, file: str, label: str = "Data (CSV)") -> Download:
    """Return ``frame`` as a CSV file: full precision, missing values empty."""
    return _link(csv_of(frame), "text/csv", label, f"{file}.csv")


def json_link(body: str, file: str, label: str) -> Download:
    return _link(body, "application/json", label, file)


@dataclass(frozen=True)
class Facts:
    """Metric cards, as pages show them, too."""

    block: ClassVar[str] = "facts"
    entries: Metrics


@dataclass(frozen=True)
class Note:
    """A highlighted sentence; ``tone`` is info, warning, missing or error."""

    block: ClassVar[str] = "note"
    tone: str
    text: str


@dataclass(frozen=True)
class Prose:
    block: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True)
class Code:
    """Preformatted text: commands or model output."""

    block: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Strip:
    """A text whose tokens are coloured.

    Attributes:
        html: the text, escaped by who made it.
        protocol: which text, and how many tokens.
    """

    block: ClassVar[str] = "strip"
    title: str
    words: str
    html: Markup
    protocol: str


@dataclass(frozen=True)
class Folded:
    """Collapsed blocks; open in print."""

    block: ClassVar[str] = "folded"
    label: str
    blocks: tuple[Block, ...]


Block = Table | Chart | Facts | Note | Prose | Code | Download | Strip | Folded


def metrics_in(blocks: Iterable[Block]) -> Iterator[Chart]:
    """Yield the charts among ``blocks``, including collapsed ones."""
    for block in blocks:
        if isinstance(block, Chart):
            yield block
        elif isinstance(block, Folded):
            yield from metrics_in(block.blocks)


@dataclass(frozen=True)
class Section:
    """A section with an anchor, a title, a subtitle and blocks."""

    anchor: str
    title: str
    question: str
    blocks: tuple[Block, ...]

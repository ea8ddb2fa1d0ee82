"""What a report is made of: sections of blocks, each a frozen value in words; the template lays them out and computes nothing.

Numbers become words here (a missing one a dash), and tables become CSV links; escaping is left to the template.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
from markupsafe import Markup

from lowrank_core.studio.shared.embedding import figure_json
from lowrank_core.studio.shared.formatting import DASH, number, percent, size
from lowrank_core.studio.shared.spreadsheet import csv_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "Block",
    "Code",
    "Column",
    "Download",
    "Facts",
    "Figure",
    "Folded",
    "Note",
    "Prose",
    "Section",
    "Strip",
    "Table",
    "csv_link",
    "drawn",
    "metrics_in",
    "json_link",
    "share",
    "sized",
    "table",
    "text",
    "value",
    "whole",
]


@dataclass(frozen=True)
class Column:
    """A column of a table: its name in the frame, its head with the unit, and how a value becomes words.

    Attributes:
        meaning: what the head does not say; empty where it says all.
        look: ``number`` stands to the right, ``short`` is not broken into lines; empty for words.
    """

    name: str
    label: str
    words: Callable[[object], str]
    meaning: str = ""
    look: str = "number"


def _float(entry: object) -> float | None:
    return None if entry is None or pd.isna(entry) else float(entry)  # type: ignore[call-overload,arg-type]


def text(name: str, label: str, meaning: str = "", *, short: bool = False) -> Column:
    def words(entry: object) -> str:
        return DASH if entry is None or entry == "" or pd.isna(entry) else str(entry)  # type: ignore[call-overload]

    return Column(name, label, words, meaning, "short" if short else "")


def value(name: str, label: str, digits: int = 4, meaning: str = "") -> Column:
    """Return a column of numbers with ``digits`` significant digits."""
    return Column(name, label, lambda entry: number(_float(entry), digits), meaning)


def whole(name: str, label: str, meaning: str = "") -> Column:
    def words(entry: object) -> str:
        result = _float(entry)
        return DASH if result is None else f"{result:,.0f}"

    return Column(name, label, words, meaning)


def share(name: str, label: str, meaning: str = "", digits: int = 1) -> Column:
    """Return a column of fractions in [0, 1], shown as percent."""
    return Column(name, label, lambda entry: percent(_float(entry), digits), meaning)


def sized(name: str, label: str, meaning: str = "") -> Column:
    """Return a column of bytes."""
    return Column(name, label, lambda entry: size(_float(entry)), meaning)


@dataclass(frozen=True)
class Download:
    """A file inside the page, as a data link."""

    kind: ClassVar[str] = "download"
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
class Table:
    """Rows in words under a caption."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    download: Download


def table(frame: pd.DataFrame, columns: Sequence[Column], *, caption: str, file: str, data: pd.DataFrame | None = None) -> Table:
    """Return those of ``columns`` that ``frame`` has; all of ``data``, the frame itself unless it is given, is in the CSV link."""
    shown = tuple(column for column in columns if column.name in frame.columns)
    cells = [[column.words(entry) for entry in frame[column.name]] for column in shown]
    return Table(caption, shown, tuple(zip(*cells, strict=True)), csv_link(frame if data is None else data, file))


@dataclass(frozen=True)
class Figure:
    """A Plotly figure with what a reader needs next to it.

    Attributes:
        how: how to read it.
        alt: what the picture shows, for those who do not see it.
        protocol: model, text, tokens and dtype behind it.
        height: pixels.
    """

    kind: ClassVar[str] = "figure"
    name: str
    title: str
    how: str
    alt: str
    protocol: str
    height: int
    json: str
    download: Download


def drawn(figure: go.Figure, data: pd.DataFrame, *, name: str, title: str, how: str, alt: str, protocol: str) -> Figure:
    """Return ``figure`` with the frame that it was drawn from; ``name`` is that of its CSV file, unique in the report."""
    height = int(figure.layout.height)
    return Figure(name, title, how, alt, protocol, height, figure_json(figure), csv_link(data, name))


@dataclass(frozen=True)
class Facts:
    """Figures side by side: label, value, what it means."""

    kind: ClassVar[str] = "facts"
    entries: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Note:
    """A sentence that must not be missed; ``tone`` is info, warning, missing or error."""

    kind: ClassVar[str] = "note"
    tone: str
    text: str


@dataclass(frozen=True)
class Prose:
    kind: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True)
class Code:
    """Text as it is: commands, or what a model wrote."""

    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Strip:
    """A text whose tokens are coloured.

    Attributes:
        html: the text, escaped by who made it.
        protocol: which text, and how many tokens.
    """

    kind: ClassVar[str] = "strip"
    title: str
    words: str
    html: Markup
    protocol: str


@dataclass(frozen=True)
class Folded:
    """Blocks that open on demand; printed open."""

    kind: ClassVar[str] = "folded"
    label: str
    blocks: tuple[Block, ...]


Block = Table | Figure | Facts | Note | Prose | Code | Download | Strip | Folded


def metrics_in(blocks: Iterable[Block]) -> Iterator[Figure]:
    """Yield the figures among ``blocks``, the folded ones, too."""
    for block in blocks:
        if isinstance(block, Figure):
            yield block
        elif isinstance(block, Folded):
            yield from metrics_in(block.blocks)


@dataclass(frozen=True)
class Section:
    """A part of the story under an anchor: its title, the question that it answers, and its blocks."""

    anchor: str
    title: str
    question: str
    blocks: tuple[Block, ...]

"""A table as it is declared, once: a page shows it with Streamlit, a report as HTML, and both offer it as CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Literal, TypeVar

import pandas as pd

from lowrank_core.studio.shared.formatting import DASH, interval_words, number, percent, sizes

__all__ = ["Column", "Getter", "Metrics", "Table", "filled", "frame_of", "intervals"]

T = TypeVar("T")

Metrics = Mapping[str, tuple[str, str]]
"""Label -> value in words, and what it means: cards of a page and of a report."""

Getter = str | Callable[[Any], object]
Kind = Literal["text", "short", "flag", "moment", "ago", "whole", "number", "scientific", "share", "bytes"]
_TYPES = {"whole": "Int64", "bytes": "Int64", "number": "float64", "share": "float64", "scientific": "float64"}
_WORDS = ("text", "short", "flag", "moment", "ago")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: in the frame; label: its head, with the unit; help: what the head does not say, empty where it says all.
        kind: how a value is shown; ``short`` is text that a report does not break into lines.
        digits: significant ones in a report, of ``share`` those behind the point.
        decimals: on a page; None shows four significant digits.
        width: pixels on a page, or a word of Streamlit's.
        getter: what a record has for it (``filled``): an attribute, or a function of the record; the attribute ``name`` where None.
    """

    name: str
    label: str
    kind: Kind
    help: str = ""
    digits: int = 4
    decimals: int | None = None
    width: int | Literal["small", "medium", "large"] | None = None
    getter: Getter | None = None

    def of(self, getter: Getter) -> Column:
        """Return the column with its getter."""
        return replace(self, getter=getter)

    @classmethod
    def text(cls, name: str, label: str, help: str = "", width: int | Literal["medium", "large"] | None = None) -> Column:
        return cls(name, label, "text", help, width=width)

    @classmethod
    def short(cls, name: str, label: str, help: str = "") -> Column:
        return cls(name, label, "short", help)

    @classmethod
    def whole(cls, name: str, label: str, help: str = "") -> Column:
        return cls(name, label, "whole", help)

    @classmethod
    def number(
        cls, name: str, label: str, decimals: int | None = None, help: str = "", digits: int = 4, width: int | None = None
    ) -> Column:
        return cls(name, label, "number", help, digits, decimals, width)

    @classmethod
    def share(cls, name: str, label: str, help: str = "", digits: int = 1) -> Column:
        """Return a column of fractions in [0, 1], shown as percent."""
        return cls(name, label, "share", help, digits)

    @property
    def look(self) -> str:
        """Layout in a report: a ``number`` stands to the right, a ``short`` text is not broken into lines."""
        return {"text": "", "short": "short"}.get(self.kind, "number")

    def cells(self, entries: Iterable[object]) -> list[str]:
        """Return ``entries`` as a report writes them: sizes in one unit."""
        return sizes(map(_float, entries)) if self.kind == "bytes" else list(map(self._words, entries))

    def _words(self, entry: object) -> str:
        if pd.isna(entry) or entry == "":  # type: ignore[call-overload]
            return DASH
        if self.kind in _WORDS:
            return str(entry)
        value = _float(entry)
        if self.kind == "whole":
            return f"{value:,.0f}"
        return percent(value, self.digits) if self.kind == "share" else number(value, self.digits)


def _float(entry: object) -> float:
    return math.nan if pd.isna(entry) else float(entry)  # type: ignore[arg-type, call-overload]


@dataclass(frozen=True)
class Table:
    """Rows under a caption, which a page gives to those who do not see the table.

    Attributes:
        columns: of ``frame``, in the order shown; those that it lacks are left out.
        file: name of the CSV file, unique in a report.
        data: what is in that file, if not ``frame``.
    """

    block: ClassVar[str] = "table"
    frame: pd.DataFrame
    columns: Sequence[Column]
    caption: str
    file: str = ""
    data: pd.DataFrame | None = None

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if column.name in self.frame.columns]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells as a report writes them."""
        return list(zip(*(column.cells(self.frame[column.name]) for column in self.shown), strict=True))


def frame_of(records: Iterable[T], **columns: str | Callable[[T], object]) -> pd.DataFrame:
    """Return a row for each record: a column is one of its attributes, or what a function makes of it."""
    rows = list(records)
    getters = {name: attrgetter(of) if isinstance(of, str) else of for name, of in columns.items()}
    return pd.DataFrame({name: [get(row) for row in rows] for name, get in getters.items()})


def filled(records: Iterable[object], columns: Sequence[Column]) -> pd.DataFrame:
    """Return a row for each record with what the columns' getters find, numbers as such; also without any record."""
    frame = frame_of(records, **{column.name: column.getter or column.name for column in columns})
    return frame.astype({column.name: _TYPES[column.kind] for column in columns if column.kind in _TYPES})


def intervals(frame: pd.DataFrame, measured: str, low: str, high: str, digits: int = 3) -> list[str]:
    """Return the ends of 95 % intervals in words; a dash where nothing was measured of which one could be."""
    rows = zip(frame[measured], frame[low], frame[high], strict=True)
    return [DASH if pd.isna(value) else interval_words(None if pd.isna(ends).any() else ends, digits) for value, *ends in rows]

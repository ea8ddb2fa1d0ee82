"""Local texts: the interpreter's sources, and the user's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pandas as pd

from lowrank_core.documents.stdlib import stdlib_documents
from lowrank_core.errors import TextError

__all__ = ["FILE_CUTS", "SPLITS", "FileText", "StdlibText", "TextDocuments"]

SPLITS = ("calibration", "validation", "test")
FILE_CUTS = (0.6, 0.8)
"""A file's first 60 % calibrate, the next 20 % validate, the last 20 % test."""


class TextDocuments(Protocol):
    """A text before tokenisation."""

    @property
    def name(self) -> str:
        """Name in protocol lines."""

    def text(self, split: str) -> str:
        """Return the characters of one split, or of all of them (``all``)."""


@dataclass(frozen=True)
class StdlibText:
    """The sources of the user's own interpreter (see ``documents.stdlib``)."""

    name: str = "python-stdlib"

    def text(self, split: str) -> str:
        splits = SPLITS if split == "all" else (split,)
        return "\n\n".join(document for part in splits for document in stdlib_documents(part))


@dataclass(frozen=True)
class FileText:
    """A file of the user's: .txt (or any plain text), .jsonl or .parquet with a ``text`` column."""

    path: Path

    @property
    def name(self) -> str:
        return f"file:{self.path.name}"

    def text(self, split: str) -> str:
        whole = self._whole
        if split == "all":
            return whole
        cuts = [0, *(_line_break(whole, int(share * len(whole))) for share in FILE_CUTS), len(whole)]
        index = SPLITS.index(split)
        return whole[cuts[index] : cuts[index + 1]]

    @cached_property
    def _whole(self) -> str:
        if not self.path.is_file():
            raise TextError(f"text: there is no file {self.path}. Check the path after `file:`.")
        try:
            text = "\n\n".join(self._documents())
        except (OSError, ValueError, ImportError) as error:
            raise TextError(
                f"text: {self.path} can't be read: {error}. Give UTF-8 .txt, .jsonl or .parquet with a `text` column."
            ) from error
        if not text.strip():
            raise TextError(f"text: {self.path} is empty. Give a file with some pages of text.")
        return text

    def _documents(self) -> Sequence[str]:
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            return _column(pd.read_parquet(self.path), self.path)
        if suffix == ".jsonl":
            with self.path.open(encoding="utf-8") as lines:
                records = [json.loads(line) for line in lines if line.strip()]
            if not all(isinstance(record, dict) and isinstance(record.get("text"), str) for record in records):
                raise TextError(f"text: each line of {self.path} must be a JSON object with a string under `text`.")
            return [record["text"] for record in records]
        return [self.path.read_text(encoding="utf-8")]


def _column(table: pd.DataFrame, path: Path) -> list[str]:
    if "text" not in table:
        columns = ", ".join(map(str, table.columns)) or "none"
        raise TextError(f"text: {path} has no column `text`; it has {columns}. Rename the column that holds the text.")
    return [str(value) for value in table["text"].dropna()]


def _line_break(text: str, position: int) -> int:
    """Return the position after the first line break from ``position`` on, so that no line is in two splits."""
    result = text.find("\n", position)
    return position if result < 0 else result + 1

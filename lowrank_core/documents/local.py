"""Local texts: the interpreter's sources, and the user's files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lowrank_core.documents.stdlib import stdlib_documents
from lowrank_core.errors import TextError

__all__ = ["FILE_CUTS", "SPLITS", "FileText", "StdlibText", "TextDocuments", "documents_of"]

SPLITS = ("calibration", "validation", "test")
FILE_CUTS = (0.6, 0.8)
"""A file's first 60 % calibrate, the next 20 % validate, the last 20 % test."""
_ROWS = 256
"""Of a .parquet file, read at once."""


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
        text = "\n\n".join(documents_of(self.path))
        if not text.strip():
            raise TextError(f"text: {self.path} is empty. Give a file with some pages of text.")
        return text


def documents_of(path: Path, column: str = "text", *, lines: bool = False, characters: int = -1) -> Iterator[str]:
    """Yield the documents of a .parquet file, of JSON lines, or a plain text, no further than they are asked for.

    Args:
        lines: whether also .json and .gz are JSON lines, as in data sets of the hub.
        characters: of a plain text, at most; all where negative.

    Raises:
        TextError: the file can't be read, or has no such column.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _rows(path, column)
        elif lines or suffix == ".jsonl":
            with gzip.open(path, "rt", encoding="utf-8") if suffix == ".gz" else path.open(encoding="utf-8") as stream:
                yield from (_document(line, path, column) for line in stream if line.strip())
        else:
            with path.open(encoding="utf-8") as stream:
                yield stream.read(characters)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TextError(f"text: {path} can't be read: {reason}. Give UTF-8 .txt, .jsonl or .parquet with a `{column}` column.") from error


def _rows(path: Path, column: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            columns = ", ".join(names) or "none"
            raise TextError(f"text: {path} has no column `{column}`; it has {columns}. Rename the column that holds the text.")
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)


def _document(line: str, path: Path, column: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        raise TextError(f"text: each line of {path} must be a JSON object with a string under `{column}`.")
    return str(record[column])


def _line_break(text: str, position: int) -> int:
    """Return the position after the first line break from ``position`` on, so that no line is in two splits."""
    result = text.find("\n", position)
    return position if result < 0 else result + 1

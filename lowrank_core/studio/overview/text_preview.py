"""Preview of a text before a run: beginning, sizes by split, downloads."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from lowrank_core.config import TextConfig
from lowrank_core.documents import (
    FILE_CUTS,
    HUB_TEXTS,
    SPLITS,
    FileText,
    HubDataset,
    StdlibText,
    TextDocuments,
    documents_of,
    files_of_split,
)
from lowrank_core.errors import TextError
from lowrank_core.studio.overview.source_checks import check_text
from lowrank_core.studio.shared.formatting import size

__all__ = ["CHARACTERS_PER_TOKEN", "SplitPreview", "TextPreview", "check_long_enough", "preview_table", "preview_warnings", "text_preview"]

CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English and a large vocabulary; a smaller vocabulary, or code, makes more tokens."""
_BEGINNING = 1200
"""Characters that are shown."""
_WHOLE_BYTES = 32 * 2**20
"""A larger file is not read before it is used: its size is reported from its length."""
_FIRST_DOCUMENTS = 20


@dataclass(frozen=True)
class SplitPreview:
    """A split: its characters (None before they are read), how it begins, and its UTF-8 bytes (None unless it was read)."""

    name: str
    characters: int | None
    beginning: str = ""
    bytes: int | None = None

    @property
    def tokens(self) -> int | None:
        """An estimate, at ``CHARACTERS_PER_TOKEN``."""
        return None if self.characters is None else self.characters // CHARACTERS_PER_TOKEN


@dataclass(frozen=True)
class TextPreview:
    """A text by split.

    Attributes:
        counted: whether characters were counted; else they are reported from the size of the file.
        note: what will be read or downloaded when a run starts, in a sentence; empty where everything is shown.
    """

    reference: str
    splits: tuple[SplitPreview, ...]
    counted: bool
    note: str = ""


def text_preview(reference: str) -> TextPreview:
    """Return beginning and size of the text.

    Raises:
        TextError: it can't be read, or lacks what a run would need; says what to do.
    """
    reference = check_text(reference)
    name, _, place = reference.partition(":")
    if name == "python-stdlib":
        return _whole(reference, StdlibText())
    if name == "file":
        path = Path(place).expanduser()
        return _whole(reference, FileText(path)) if path.stat().st_size <= _WHOLE_BYTES else _large(reference, path)
    return _copy(reference, HUB_TEXTS[name], Path(place).expanduser()) if place else _remote(reference, HUB_TEXTS[name])


def _whole(reference: str, source: TextDocuments) -> TextPreview:
    texts = {split: source.text(split) for split in SPLITS}
    splits = tuple(SplitPreview(split, len(text), text[:_BEGINNING], len(text.encode())) for split, text in texts.items())
    return TextPreview(reference, splits, counted=True)


def _large(reference: str, path: Path) -> TextPreview:
    """Preview a large file by its first documents and its size in bytes."""
    total, first = path.stat().st_size, list(islice(documents_of(path, characters=_BEGINNING), _FIRST_DOCUMENTS))
    if path.suffix.lower() == ".parquet":
        total = pq.ParquetFile(path).metadata.num_rows * sum(map(len, first)) // max(1, len(first))
    ends = [0, *(int(share * total) for share in FILE_CUTS), total]
    beginning = "\n\n".join(first)[:_BEGINNING]
    splits = tuple(SplitPreview(split, ends[i + 1] - ends[i], beginning if i == 0 else "") for i, split in enumerate(SPLITS))
    return TextPreview(reference, splits, counted=False, note=f"A file of {size(path.stat().st_size)}: it is read when a run starts.")


def _copy(reference: str, dataset: HubDataset, folder: Path) -> TextPreview:
    """Preview a local copy of a benchmark text by the first rows of each split's first file."""
    _check_datasets(dataset.name)
    splits = []
    total = 0
    for split in SPLITS:
        files = files_of_split(dataset, folder, dataset.splits[split][0])
        total += sum(file.stat().st_size for file in files)
        first = list(islice(documents_of(files[0], dataset.column, lines=True), _FIRST_DOCUMENTS))
        splits.append(SplitPreview(split, None, dataset.joiner.join(first)[:_BEGINNING]))
    return TextPreview(reference, tuple(splits), counted=False, note=f"A local copy: {size(total)} are read when a run starts.")


def _remote(reference: str, dataset: HubDataset) -> TextPreview:
    _check_datasets(dataset.name)
    what = ", ".join(dataset.files.values()) if dataset.files else dataset.configuration or "all of it"
    note = (
        f"Unless it is in the cache of the `datasets` library, `{dataset.repository}` ({what}) is downloaded from huggingface.co when a "
        "run starts. Without a connection, give the folder of a local copy."
    )
    return TextPreview(reference, tuple(SplitPreview(split, None) for split in SPLITS), counted=False, note=note)


def _check_datasets(name: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise TextError(f'{name} needs the `datasets` library: python -m pip install ".[data]". Or give a file of your own.')


def preview_table(preview: TextPreview, text: TextConfig) -> pd.DataFrame:
    """Return a row for each split: characters, estimated tokens and windows, requested windows."""
    rows = [
        {"split": s.name, "characters": s.characters, "tokens": s.tokens, "windows": _windows(s, text), "asked": asked}
        for s, asked in zip(preview.splits, _asked(text), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["split", "characters", "tokens", "windows", "asked"])
    return frame.astype(dict.fromkeys(("characters", "tokens", "windows"), "Int64"))


def _windows(split: SplitPreview, text: TextConfig) -> int | None:
    return None if split.tokens is None else split.tokens // text.context


def preview_warnings(preview: TextPreview, text: TextConfig) -> list[str]:
    """Return warnings on splits that may be too short, with a remedy."""
    result = []
    for split, asked in zip(preview.splits, _asked(text), strict=True):
        windows = _windows(split, text)
        if windows is None or windows >= asked:
            continue
        if windows < 1:
            result.append(f"The {split.name} split may hold no window of {text.context} tokens. Give a longer text, or a shorter context.")
        else:
            result.append(
                f"The {split.name} split may hold about {windows} windows, fewer than the requested {asked}. All of them are used."
            )
    return result


def check_long_enough(preview: TextPreview, text: TextConfig) -> None:
    """Refuse a text of which a split can't hold a window, whatever the tokenizer: no token is less than a byte.

    A tokenizer may put a blank before the text, and a window begin with BOS.

    Raises:
        TextError: a split is too short.
    """
    for split in preview.splits:
        if split.bytes is not None and split.bytes + 2 < text.context:
            raise TextError(
                f"text: the {split.name} split of {preview.reference} has {split.bytes} bytes, fewer than the tokens of one window "
                f"({text.context}). Give a longer text, or a shorter context."
            )


def _asked(text: TextConfig) -> tuple[int, int, int]:
    return text.calibration_windows, text.validation_windows, text.test_windows

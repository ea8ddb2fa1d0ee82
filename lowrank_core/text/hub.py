"""Benchmark texts through the `datasets` library: from the hub, or from a local folder of the same form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from lowrank_core.errors import TextError

__all__ = ["HUB_TEXTS", "HubDataset", "HubText"]


@dataclass(frozen=True, eq=False)
class HubDataset:
    """Where a benchmark text lives and how its rows become a text.

    Attributes:
        name: what users call it.
        repository, configuration, revision: on the hub.
        splits: our split -> (the data set's split, part); the part says which share of its documents is ours.
        column: the column that holds text.
        joiner: put between documents, as the field's protocol for this text does.
        most_documents: documents read of one split; the rest of a web-scale text is not needed.
        files: files to read instead of all, by the data set's split.
    """

    name: str
    repository: str
    configuration: str | None
    splits: Mapping[str, tuple[str, str]]
    column: str = "text"
    joiner: str = "\n\n"
    revision: str | None = None
    most_documents: int | None = None
    files: Mapping[str, str] | None = None


_THREE = {"calibration": ("train", "whole"), "validation": ("validation", "whole"), "test": ("test", "whole")}

HUB_TEXTS: dict[str, HubDataset] = {
    "wikitext-2": HubDataset("wikitext-2", "Salesforce/wikitext", "wikitext-2-raw-v1", _THREE),
    "c4": HubDataset(
        "c4",
        "allenai/c4",
        None,
        # C4 has no test split: its validation split is dealt out in turn, even documents and odd ones.
        {"calibration": ("train", "whole"), "validation": ("validation", "even"), "test": ("validation", "odd")},
        most_documents=4000,
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "ptb": HubDataset("ptb", "ptb-text-only/ptb_text_only", "penn_treebank", _THREE, "sentence", " ", "refs/convert/parquet"),
}


@dataclass(frozen=True)
class HubText:
    """A benchmark text; ``folder`` is a local copy in the same form, to work offline."""

    dataset: HubDataset
    folder: Path | None = None

    @property
    def name(self) -> str:
        return self.dataset.name

    def text(self, split: str) -> str:
        splits = self.dataset.splits if split == "all" else (split,)
        return self.dataset.joiner.join(document for part in splits for document in _documents(self, part))


@cache
def _documents(source: HubText, split: str) -> tuple[str, ...]:
    dataset = source.dataset
    theirs, part = dataset.splits[split]
    rows = _rows(source, theirs)
    try:
        documents = tuple(str(row[dataset.column]) for row in rows)
    except KeyError as error:
        raise TextError(
            f"text: {dataset.name} in {source.folder} has no column {error}. Give a copy in the form of the original."
        ) from error
    if not any(document.strip() for document in documents):
        raise TextError(f"text: the {theirs} split of {dataset.name} is empty.")
    return documents if part == "whole" else documents[0 if part == "even" else 1 :: 2]


def _rows(source: HubText, split: str) -> list[Mapping[str, Any]]:
    """Return the rows of the data set's ``split``, all that are needed; a streamed one can fail at any row."""
    try:
        import datasets
    except ImportError as error:
        raise TextError(f'text: {source.name} needs the `datasets` library: python -m pip install ".[data]".') from error
    dataset, folder = source.dataset, source.folder
    if folder is not None and not folder.is_dir():
        raise TextError(f"text: there is no folder {folder}. Check the path after `{dataset.name}:`.")
    streaming = dataset.most_documents is not None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if folder is not None:
            return list(islice(_local_rows(datasets, dataset, folder, split), dataset.most_documents))
        files = {split: dataset.files[split]} if dataset.files else None
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            dataset.repository, dataset.configuration, data_files=files, split=split, revision=dataset.revision, streaming=streaming
        )
        return list(islice(rows, dataset.most_documents))
    except TextError:
        raise
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and the connection's errors
        first = str(error).strip().split("\n")[0][:200]
        raise TextError(
            f"text: {dataset.name} can't be loaded ({type(error).__name__}: {first}). "
            f"Check the connection, or give a local copy as {dataset.name}:FOLDER."
        ) from error


def _names_split(path: Path, split: str) -> bool:
    """Whether ``train-00000-of-00001.parquet``, ``c4-train.00000-of-01024.json.gz`` or ``train/0000.parquet`` is of ``split``."""
    return any(split in re.split(r"[-._]", part) for part in path.parts)


def _local_rows(datasets: Any, dataset: HubDataset, folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """Read the files of ``split``, told by their names or those of their folders, in ``folder`` or its configuration's subfolder."""
    place = folder / dataset.configuration if dataset.configuration and (folder / dataset.configuration).is_dir() else folder
    loaders = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json"}
    files = sorted(path for path in place.rglob("*") if path.suffix in loaders and _names_split(path.relative_to(place), split))
    if not files:
        raise TextError(
            f"text: {place} holds no .parquet or .json file of the {split} split. Copy the data set's folder as it is on the hub."
        )
    loader = loaders[files[0].suffix]
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        loader,
        data_files={split: [str(path) for path in files]},
        split=split,
        streaming=True,  # read where they are: no copy in the library's cache
    )
    return rows

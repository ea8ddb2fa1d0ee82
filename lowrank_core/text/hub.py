"""Benchmark texts through the `datasets` library: from the hub, or from a local folder of the same form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from lowrank_core.documents.benchmark_texts import HUB_TEXTS, LOADERS, HubDataset, files_of_split
from lowrank_core.errors import TextError

__all__ = ["HUB_TEXTS", "HubDataset", "HubText"]


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
            f"text: {dataset.name} in {source.folder} has no column {error}. Give a copy in the form of the dense model."
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
    streaming = dataset.max_documents is not None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if folder is not None:
            return list(islice(_local_rows(datasets, dataset, folder, split), dataset.max_documents))
        files = {split: dataset.files[split]} if dataset.files else None
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            dataset.repository, dataset.configuration, data_files=files, split=split, revision=dataset.revision, streaming=streaming
        )
        return list(islice(rows, dataset.max_documents))
    except TextError:
        raise
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and the connection's errors
        first = str(error).strip().split("\n")[0][:200]
        raise TextError(
            f"text: {dataset.name} can't be loaded ({type(error).__name__}: {first}). "
            f"Check the connection, or give a local copy as {dataset.name}:FOLDER."
        ) from error


def _local_rows(datasets: Any, dataset: HubDataset, folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """Read the files of ``split`` where they are."""
    files = files_of_split(dataset, folder, split)
    loader = LOADERS[files[0].suffix]
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        loader,
        data_files={split: [str(path) for path in files]},
        split=split,
        streaming=True,  # read where they are: no copy in the library's cache
    )
    return rows

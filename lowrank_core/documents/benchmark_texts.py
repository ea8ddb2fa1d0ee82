"""Benchmark texts: location on the hub, conversion of rows to text, layout of a local copy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.errors import TextError

__all__ = ["HUB_TEXTS", "LOADERS", "HubDataset", "files_of_split"]

LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json"}
"""Suffix of a file -> the loader of the `datasets` library that reads it."""


@dataclass(frozen=True, eq=False)
class HubDataset:
    """A benchmark text on the hub.

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
    max_documents: int | None = None
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
        max_documents=4000,
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "ptb": HubDataset("ptb", "ptb-text-only/ptb_text_only", "penn_treebank", _THREE, "sentence", " ", "refs/convert/parquet"),
}


def _names_split(path: Path, split: str) -> bool:
    """Return whether ``train-00000-of-00001.parquet``, ``c4-train.00000-of-01024.json.gz`` or ``train/0000.parquet`` is of ``split``."""
    return any(split in re.split(r"[-._]", part) for part in path.parts)


def files_of_split(dataset: HubDataset, folder: Path, split: str) -> list[Path]:
    """Return the files of the data set's ``split``, known by their names or those of their folders, in ``folder`` or its configuration's.

    Raises:
        TextError: there is none.
    """
    place = folder / dataset.configuration if dataset.configuration and (folder / dataset.configuration).is_dir() else folder
    files = sorted(path for path in place.rglob("*") if path.suffix in LOADERS and _names_split(path.relative_to(place), split))
    if not files:
        raise TextError(
            f"text: {place} holds no .parquet or .json file of the {split} split. Copy the data set's folder as it is on the hub."
        )
    return files

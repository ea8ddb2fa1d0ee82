"""Checks of what a user typed, before a worker is started for it."""

from __future__ import annotations

import re
from pathlib import Path

from lowrank_core.config import looks_like_path
from lowrank_core.errors import ModelError, TextError
from lowrank_core.runs import bundled_path
from lowrank_core.views.headers import header_facts
from lowrank_core.views.model import ModelFacts

__all__ = ["TEXTS", "check_model", "check_text", "model_folder"]

TEXTS = {
    "python-stdlib": "Python standard library (offline)",
    "wikitext-2": "WikiText-2",
    "c4": "C4",
    "ptb": "Penn Treebank",
    "file": "A file of mine",
}
"""Reference -> label; ``file`` stands for ``file:PATH``."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def model_folder(reference: str) -> Path | None:
    """Return the folder that ``reference`` names, or None for a hub id."""
    if reference == "demo":
        return bundled_path("assets", "demo-lm")
    folder = Path(reference).expanduser()
    return folder if looks_like_path(reference) or folder.exists() else None


def check_model(reference: str) -> ModelFacts | None:
    """Return the facts of a local model, None for a hub id (known once it was fetched).

    Raises:
        ModelError: the folder is missing or holds no model, or the name can't be a hub id.
    """
    reference = reference.strip()
    if not reference:
        raise ModelError("No model is given. Enter a local folder or a hub id, or choose the bundled model.")
    folder = model_folder(reference)
    if folder is None:
        if not _HUB_ID.match(reference):
            raise ModelError(f"{reference!r} is neither a folder nor a hub id. A hub id looks like `owner/name`.")
        return None
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}. Check the path; it must be readable on the machine that runs the dashboard.")
    return header_facts(folder)


def check_text(reference: str) -> str:
    """Return ``reference`` if its source can exist.

    Raises:
        TextError: a file that is missing, empty or of an unknown form, or an unknown name.
    """
    reference = reference.strip()
    name, _, place = reference.partition(":")
    if name not in TEXTS:
        raise TextError(f"Unknown text {reference!r}. Use {', '.join(n for n in TEXTS if n != 'file')} or file:PATH.")
    if name == "file":
        _check_file(place)
    elif place and not Path(place).expanduser().is_dir():
        raise TextError(f"There is no folder {place}. Check the path of the local copy of {name}.")
    return reference


def _check_file(place: str) -> None:
    path = Path(place).expanduser()
    if not place:
        raise TextError("No file is given. Enter the path of a .txt, .jsonl or .parquet file.")
    if path.suffix.lower() not in _TEXT_SUFFIXES:
        raise TextError(f"{path.name} is not a text file that can be read: use {', '.join(_TEXT_SUFFIXES)}.")
    if not path.is_file():
        raise TextError(f"There is no file {path}. Check the path; it must be readable on the machine that runs the dashboard.")
    if path.stat().st_size == 0:
        raise TextError(f"{path} is empty. Give a file with text in it.")

"""Validation of user input before a worker starts: model and text references."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants

from lowrank_core.config import looks_like_path
from lowrank_core.errors import ModelError, TextError
from lowrank_core.files.gguf import is_gguf
from lowrank_core.files.weights import weight_files
from lowrank_core.runs import bundled_path
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.shared.model_facts import ModelFacts

__all__ = ["TEXTS", "check_model", "check_text", "hub_cache", "local_model"]

TEXTS = {
    "python-stdlib": "Python standard library (offline)",
    "wikitext-2": "WikiText-2",
    "c4": "C4",
    "ptb": "Penn Treebank",
    "file": "Own file",
}
"""Reference -> label; ``file`` stands for ``file:PATH``."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def hub_cache() -> Path:
    """Return the folder that models of the hub are downloaded to."""
    return Path(constants.HF_HUB_CACHE)


def local_model(reference: str) -> Path | None:
    """Return the local folder, or GGUF file, of ``reference``; None for a hub id not downloaded yet.

    Raises:
        ModelError: nothing is given, the folder or file is missing, or the name can't be a hub id.
    """
    reference = reference.strip()
    if not reference:
        raise ModelError("No model is given. Enter a local folder, a GGUF file or a hub id, or choose the bundled model.")
    if reference == "demo":
        return bundled_path("assets", "demo-lm")
    place = Path(reference).expanduser()
    if looks_like_path(reference) or is_gguf(reference) or place.exists():
        if not place.is_dir() and not (is_gguf(place) and place.is_file()):
            kind = "GGUF file" if is_gguf(place) else "folder"
            raise ModelError(f"There is no {kind} {place}. Check the path; it must be readable on the machine that runs the dashboard.")
        return place
    if not _HUB_ID.match(reference):
        raise ModelError(f"{reference!r} is neither a folder nor a hub id. A hub id looks like `owner/name`.")
    return _downloaded(reference)


def _downloaded(hub_id: str) -> Path | None:
    """Return the snapshot of ``hub_id`` in the hub's cache, if its config and all its weights are there."""
    repository = hub_cache() / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshot = repository / "snapshots" / commit
        weight_files(snapshot)
    except (OSError, ValueError, ModelError):  # what is missing will be downloaded
        return None
    return snapshot if commit and (snapshot / "config.json").is_file() else None


def check_model(reference: str) -> ModelFacts | None:
    """Return the facts of a local model, None for a hub id not downloaded yet.

    Raises:
        ModelError: as ``local_model``, or it holds no model that can be compressed.
    """
    place = local_model(reference)
    return None if place is None else read_model(place).facts


def check_text(reference: str) -> str:
    """Return ``reference`` if its source exists.

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

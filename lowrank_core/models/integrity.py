"""Integrity of a folder's weight files, by the hashes in ``lowrank.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank_core.errors import ModelError

__all__ = ["MANIFEST", "check_folder", "check_weights", "sha256_of"]

MANIFEST = "lowrank.json"
_AGAIN = f"Copy or export the model again; if you saved over it yourself, delete {MANIFEST}."


def sha256_of(path: Path) -> str:
    """Return the hash of a file in hexadecimal digits, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: Path) -> int:
    """Check every file that the manifest of ``folder`` lists, and return how many that are: 0 where there is no manifest.

    A folder that a user's own ``save_pretrained`` wrote has none, nor do exports of the first versions list any file.

    Raises:
        ModelError: the manifest can't be read, or a file is missing, cut short or altered.
    """
    listed = _listed(folder)
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"model: {name}, which {MANIFEST} lists, is missing. {_AGAIN}")
        result = path.stat().st_size
        if result != size:
            raise ModelError(f"model: {name} is damaged or cut short: {result} bytes, {MANIFEST} says {size}. {_AGAIN}")
        if sha256_of(path) != digest:
            raise ModelError(f"model: {name} is not what was exported, its sha256 differs from that in {MANIFEST}. {_AGAIN}")
    return len(listed)


def check_weights(files: Sequence[Path]) -> None:
    """Check weight files before they are read: safetensors alone, and as the manifest next to them lists them.

    Raises:
        ModelError: as ``check_folder``; or a file is in another format, or not listed.
    """
    for path in files:
        if path.suffix != ".safetensors":
            raise ModelError(f"model: {path.name} is no safetensors file; nothing else is read. Save the model with safetensors.")
    for folder in dict.fromkeys(path.parent for path in files):
        if check_folder(folder):
            listed = _listed(folder)
            for path in files:
                if path.parent == folder and path.name not in listed:
                    raise ModelError(f"model: {path.name} is not among the files that {MANIFEST} lists. {_AGAIN}")


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Return name -> size in bytes and sha256."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8")).get("files", {})
        return {_plain(name): _stated(entry) for name, entry in files.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"model: {MANIFEST} is damaged. {_AGAIN}") from error


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(name)
    return name


def _stated(entry: Mapping[str, object]) -> tuple[int, str]:
    size, digest = entry["bytes"], entry["sha256"]
    if type(size) is not int or not isinstance(digest, str):
        raise ValueError(entry)
    return size, digest

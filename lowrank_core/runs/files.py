"""JSON files shared by several processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_core.errors import RunError

__all__ = ["JsonMapping", "read_json", "write_json"]

JsonMapping = dict[str, Any]


def read_json(path: Path) -> JsonMapping | None:
    """Return the object in ``path``; None if there is no file (yet).

    Raises:
        RunError: the file is damaged.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read: {error}. Delete the run, or restore the file.") from error
    if not isinstance(body, dict):
        raise RunError(f"{path} holds no JSON object. Delete the run, or restore the file.")
    return body


def replace_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace ``path``, whole or not at all.

    Raises:
        OSError: the disk is full or read-only.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        if not private:
            Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide a shared run, or a report, from the rest of a team
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, body: Mapping[str, object], *, private: bool = False) -> None:
    """Replace ``path`` atomically: a reader sees the old object or the new one, never half of one.

    ``private`` leaves it to its owner alone.

    Raises:
        RunError: the disk is full or read-only.
    """
    text = json.dumps(body, indent=1, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(), private=private)
    except OSError as error:
        raise RunError(
            f"can't write {path}: {error.strerror}. Free some space, or set LOWRANK_HOME to a folder that you can write to."
        ) from error

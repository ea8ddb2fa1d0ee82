"""Folders that are written whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_core.errors import RunError

__all__ = ["check_free", "whole_folder"]


def check_free(folder: Path) -> None:
    """Raise unless ``folder`` can become an export.

    Raises:
        RunError: it holds something already, or its parent can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file. Give a new folder with --out.")
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty. Give a new folder with --out.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"can't write {folder}: {parent} is no folder that you can write to. Give another folder with --out.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes ``folder`` at the end; of one that fails, nothing is left.

    Raises:
        RunError: the folder is taken, or the disk is full or read-only.
    """
    folder = folder.absolute()
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in filter(Path.is_file, temporary.rglob("*")):
            path.chmod(0o644)  # safetensors writes 0600, which hides a shared export from the rest of a team
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise RunError(f"can't write {folder}: {error.strerror or error}. Free some space, or give another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Numpy archives that carry the SHA-256 of what is in them: what was altered or damaged is not believed. Torch-free."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["DAMAGE", "read_archive", "write_archive"]

Array = npt.NDArray[np.generic]

_DIGEST = "sha256"

DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RuntimeError, MemoryError),  # RuntimeError: a flag of encryption
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""Whatever zipfile, zlib and numpy raise on a damaged archive: flipped bits make them ask for a password, too."""


def _digest(arrays: Mapping[str, Array]) -> str:
    result = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        result.update(f"{name} {array.dtype.str} {array.shape}".encode())
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


def write_archive(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write ``arrays`` compressed, with their digest, whole or not at all.

    Raises:
        OSError: the disk is full or read-only.
    """
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **{**arrays, _DIGEST: np.array(_digest(arrays))})  # type: ignore[arg-type]
    temporary.replace(path)


def read_archive(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Return the arrays that ``write_archive`` wrote, nothing unpickled; files of earlier versions have no digest to check.

    Raises:
        one of ``DAMAGE``: the file is not there, or damaged.
    """
    with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    stated = arrays.pop(_DIGEST, None)
    if stated is not None and str(stated) != _digest(arrays):
        raise ValueError("it is damaged: it does not hold what was written, its SHA-256 differs")
    return arrays

"""Start of fresh Python processes: our package is importable, the working directory is not on the path.

A worker works in its run's folder, and a run's folder may come from anywhere: a ``json.py`` in it must never be imported. Every process
that this package starts gets its command and its environment here. Torch-free.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

__all__ = ["python_command", "python_environment", "return_freed_arrays"]

_MMAP_THRESHOLD = -3
"""Number of that parameter in glibc's ``mallopt``."""

_RETURNED_BYTES = 2**23


def return_freed_arrays() -> None:
    """Let glibc give large arrays back to the system when they are freed; by itself it soon keeps those of up to 32 MiB for later."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _RETURNED_BYTES)


def python_command(*arguments: str) -> list[str]:
    """Return the command of this interpreter; ``-P`` keeps the working directory (``-m``, ``-c``) and a script's folder off the path."""
    return [sys.executable, "-P", *arguments]


def python_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with ``changes``, for ``python_command`` and its children.

    A checkout that is not installed is found, too. Entries of PYTHONPATH are made absolute, and empty ones are left out: Python takes
    them relative to the new process's working directory.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    entries = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    result = {"PYTHONPATH": os.pathsep.join(dict.fromkeys([package_root, *entries])), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **result, **changes}

"""The `python-stdlib` text: the sources of the user's own interpreter, split by module name.

A module belongs to one split for good, decided by a hash of its dotted name, so that a model trained on the
``train`` part (the bundled one is) never saw a line of the modules that calibrate, tune or test it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lowrank_core.errors import TextError

__all__ = ["SPLIT_PERCENT", "iter_modules", "split_of_module", "stdlib_documents"]

SPLIT_PERCENT = {"calibration": 10, "validation": 10, "test": 10}
"""Share of the modules (in percent, by hash) held out for each purpose; the rest may be trained on."""

_EXCLUDED_PARTS = frozenset(
    # Tests and tools that many distributions leave out, and generated tables that are not prose or code.
    {
        "__pycache__",
        "config",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_SMALLEST_MODULE = 400
"""Characters below which a module is an empty ``__init__`` or a stub that teaches nothing."""


def split_of_module(name: str) -> str:
    """Return the split that owns the module ``name``: calibration, validation, test or train."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    for split, percent in SPLIT_PERCENT.items():
        if bucket < percent:
            return split
        bucket -= percent
    return "train"


def _excluded(part: str) -> bool:
    return part in _EXCLUDED_PARTS or part.startswith(("_sysconfigdata", "config-"))


def _module_paths(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [part for part in subfolders if not _excluded(part)]  # site-packages may hold more than all the rest
        yield from (Path(folder, file) for file in files if file.endswith(".py") and not _excluded(file.removesuffix(".py")))


def iter_modules(root: Path, split: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield ``(dotted name, source)`` of the importable sources under ``root``, ordered by path; those of one split if it is given."""
    for path in sorted(_module_paths(root)):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        if split is not None and split_of_module(name) != split:
            continue
        try:
            with tokenize.open(path) as handle:
                source = handle.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a fixture with a broken encoding, or a dangling link: not text
        if len(source) >= _SMALLEST_MODULE:
            yield name, source


@cache
def stdlib_documents(split: str) -> tuple[str, ...]:
    """Return the sources of the standard library's modules in ``split``.

    The order is that of the hashes of the names: the same for a given interpreter, and mixed, so that the first
    few windows are not all of one package.

    Raises:
        TextError: the interpreter carries no library sources (a frozen or zipped build).
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen = [(hashlib.sha256(name.encode()).digest(), text) for name, text in iter_modules(root, split)]
    if not chosen:
        raise TextError(
            f"python-stdlib: no library sources under {root} for the {split} split; "
            "this interpreter ships none. Use file:PATH with a text of your own."
        )
    return tuple(text for _, text in sorted(chosen))

"""Text sources. Each gives three disjoint splits: calibration, validation (what a search sees) and test."""

from __future__ import annotations

from pathlib import Path

from lowrank_core.documents import SPLITS, FileText, StdlibText, TextDocuments
from lowrank_core.errors import TextError
from lowrank_core.text.hub import HUB_TEXTS, HubText

__all__ = ["SPLITS", "FileText", "StdlibText", "TextDocuments", "open_text"]


def open_text(reference: str) -> TextDocuments:
    """Return the source that ``reference`` names; nothing is read yet.

    Raises:
        TextError: no source has that name.
    """
    name, _, rest = reference.partition(":")
    if name == "python-stdlib" and not rest:
        return StdlibText()
    if name == "file":
        if not rest:
            raise TextError("text: `file:` needs a path, as in file:notes.txt.")
        return FileText(Path(rest).expanduser())
    if name in HUB_TEXTS:
        return HubText(HUB_TEXTS[name], Path(rest).expanduser() if rest else None)
    choices = ", ".join(["python-stdlib", "file:PATH", *HUB_TEXTS])
    hint = f" For a file, write file:{reference}." if Path(reference).exists() else ""
    raise TextError(f"text: {reference!r} is none of {choices}.{hint}")

"""Files of JSON lines that grow: what a killed process leaves is at most a torn last line, which does not count. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["append_line", "whole_lines"]


def append_line(path: Path, body: Mapping[str, object]) -> None:
    """Add a line; a torn one is cut off first."""
    line = json.dumps(body, allow_nan=False) + "\n"
    with path.open("a+b") as stream:
        stream.truncate(path.read_bytes().rfind(b"\n") + 1)
        stream.write(line.encode())


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file but a torn last one; none where there is no file."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []

"""Paths of the user's home and of bundled files."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["bundled_path", "home", "statistics_home"]


def home() -> Path:
    """Return the folder that holds runs and statistics: ``$LOWRANK_HOME``, else ``~/.cache/lowrank``."""
    return Path(os.environ.get("LOWRANK_HOME") or Path.home() / ".cache" / "lowrank").expanduser().absolute()


def statistics_home() -> Path:
    """Return the folder that holds statistics by their content, shared by all runs."""
    return home() / "statistics"


def bundled_path(*parts: str) -> Path:
    """Return the path of a bundled file (from a checkout or an installed wheel)."""
    package = Path(__file__).resolve().parents[1]
    root = package / "_bundle" if (package / "_bundle").is_dir() else package.parent
    return root.joinpath(*parts)

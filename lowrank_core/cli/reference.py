"""The options of every command as tables: ``docs/options.md``."""

from __future__ import annotations

from collections.abc import Iterable

from lowrank_core.catalogue import as_markdown, sentence_of
from lowrank_core.cli.options import SECTIONS
from lowrank_core.config.options import options_of

__all__ = ["options_reference"]

_INTRODUCTION = """# Options

Written by `lowrank methods --options`; a test compares. Every command takes those of the configs that it needs, and `--config FILE`:
the JSON that a run records (its `run.json`, or sections of it). Flags come on top of the file.
"""


def options_reference(kinds: Iterable[type] = SECTIONS) -> str:
    """Return a table for each config class: flag, default, meaning."""
    return "\n\n".join([_INTRODUCTION.rstrip(), *(_section(kind) for kind in kinds if options_of(kind))])


def _section(kind: type) -> str:
    rows = [
        {
            "flag": f"`{declared.flag}`",
            "default": declared.option.fallback or declared.typed(declared.default),
            "meaning": sentence_of(declared).replace("|", "\\|"),
        }
        for declared in options_of(kind)
    ]
    return f"## {kind.__name__}\n\n{(kind.__doc__ or '').strip().splitlines()[0]}\n\n{as_markdown(rows)}"

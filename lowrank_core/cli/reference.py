"""The options of every command as tables: ``docs/options.md``."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.catalogue import as_markdown, sentence_of
from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, ModelSource, SearchConfig, TextConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.options import options_of
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.sensitivity.config import SensitivityConfig

__all__ = ["options_reference"]

_KINDS = (
    *(ModelSource, TextConfig, CalibrationConfig, CompressionConfig, SearchConfig),
    *(ExportConfig, HealingConfig, SensitivityConfig, SpeedConfig),
)
_INTRODUCTION = """# Options

Written by `lowrank methods --options`; a test compares. Every command takes those of the configs that it needs, and `--config FILE`:
the JSON that a run records (its `run.json`, or sections of it). Flags come on top of the file.
"""


def options_reference(kinds: Sequence[type] = _KINDS) -> str:
    """Return a table for each config class: flag, default, meaning."""
    return "\n\n".join([_INTRODUCTION.rstrip(), *map(_section, kinds)])


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

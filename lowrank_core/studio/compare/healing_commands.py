"""The commands that repeat a healing: the one-shot model, written, and ``lowrank heal`` on its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from lowrank_core.config import ExportConfig, ModelSource, RunConfig, TextConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.runs import Run
from lowrank_core.studio.export.export_plan import Source
from lowrank_core.studio.shared.reproduce import command_line, compress_command, compress_unsaid, export_command

__all__ = ["HealingCommands", "heal_command", "healing_commands"]

_UNSAID_TEXT, _UNSAID = ("validation_windows",), ("warmup",)
"""What matters to a healing and has no option of ``lowrank heal``."""


@dataclass(frozen=True)
class HealingCommands:
    """How a healing is repeated.

    Attributes:
        lines: two commands, one a line: the first writes the one-shot model, the second heals it. Empty where options can't say it.
        ranks: name of the file of ranks that the first one reads; empty where it takes a trial.
        unsaid: names of what no option says, with their values; the reason why ``lines`` is empty.
    """

    lines: str
    ranks: str
    unsaid: Mapping[str, object]

    @property
    def why_not(self) -> str:
        """Why there are no lines, in a sentence; empty where there are."""
        named = ", ".join(f"{name} = {value}" for name, value in self.unsaid.items())
        return f"No commands say the same healing: these have no option of their own: {named}." if named else ""


def healing_commands(run: Run, source: Source, export: ExportConfig | None = None) -> HealingCommands:
    """Return how the healed model ``source`` of ``run`` is made again, and written as ``export`` says.

    A healed folder is stored in the dtype of the one that it was made from: the first command has the option for it.
    """
    assert source.healing is not None
    config, export = run.config, export or ExportConfig()
    stored = ExportConfig(dtype=export.dtype)
    ranks = "" if source.number is not None else f"{source.name}.json"
    folder = stored.folder_name(f"{source.name}-one-shot" if ranks else f"trial-{source.number}")
    unsaid = _unsaid(config, source.healing) | (compress_unsaid(config, stored) if ranks else {})
    if source.number is not None:
        first = export_command(str(run.path), source.number, stored)
    else:
        first = compress_command(config, ranks, folder, stored)
    second = heal_command(config, source.healing, folder, export.folder_name(source.name), export)
    return HealingCommands("" if unsaid else f"{first}\n{second}", ranks, unsaid)


def heal_command(config: RunConfig, healing: HealingConfig, model: str, out: str, export: ExportConfig) -> str:
    """Return the command that heals the folder ``model`` as ``healing`` says, on the run's text, and writes ``out``.

    Method and steps are always said, the other options where they are not the usual ones.
    """
    cut = _unusual(config.text, TextConfig(), ("context", "bos"))
    windows = _unusual(config.text, TextConfig(), ("test_windows",)).get("test_windows")
    settings = _unusual(healing, HealingConfig(), (field.name for field in fields(healing) if field.name not in _UNSAID))
    return command_line(
        "heal",
        {
            "model": model,
            **_unusual(config.model, ModelSource(), ("device", "dtype")),
            "text": config.text.reference,
            "windows": windows,
            **cut,
            "method": healing.method,
            "steps": healing.steps,
            **settings,
            "out": out,
            **replace(export, dtype=ExportConfig().dtype).options,
        },
    )


def _unsaid(config: RunConfig, healing: HealingConfig) -> dict[str, object]:
    text, ours = _unusual(config.text, TextConfig(), _UNSAID_TEXT), _unusual(healing, HealingConfig(), _UNSAID)
    return {f"text.{name}": value for name, value in text.items()} | {f"healing.{name}": value for name, value in ours.items()}


def _unusual(ours: object, usual: object, names: Iterable[str]) -> dict[str, object]:
    """Return those of the fields ``names`` of a dataclass that are not as usual."""
    return {name: value for name in names if (value := getattr(ours, name)) != getattr(usual, name)}

"""Commands that reproduce a healing: export of the one-shot model, then ``lowrank heal``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowrank_core.config import ExportConfig, RunConfig
from lowrank_core.config.flags import command_line, flags_of
from lowrank_core.config.healing import HealingConfig
from lowrank_core.runs import Run
from lowrank_core.studio.export.export_plan import Source
from lowrank_core.studio.shared.reproduce import compress_command, export_command

__all__ = ["HealingCommands", "heal_command", "healing_commands"]


@dataclass(frozen=True)
class HealingCommands:
    """Commands that reproduce a healing.

    Attributes:
        lines: two commands, one a line: the first writes the one-shot model, the second heals it.
        ranks: name of the file of ranks that the first one reads; empty where it takes a trial.
    """

    lines: str
    ranks: str


def healing_commands(run: Run, source: Source, export: ExportConfig | None = None) -> HealingCommands:
    """Return the commands that rebuild the healed model ``source`` of ``run`` and write it in the form of ``export``.

    A healed folder is stored in the dtype of the one that it was made from: the first command has the flag for it.
    """
    assert source.healing is not None
    config, export = run.config, export or ExportConfig()
    stored = ExportConfig(dtype=export.dtype)
    ranks = "" if source.number is not None else f"{source.name}.json"
    folder = stored.folder_name(f"{source.name}-one-shot" if ranks else f"trial-{source.number}")
    if source.number is not None:
        first = export_command(str(run.path), source.number, stored)
    else:
        first = compress_command(config, ranks, folder, stored)
    return HealingCommands(f"{first}\n{heal_command(config, source.healing, folder, export.folder_name(source.name), export)}", ranks)


def heal_command(config: RunConfig, healing: HealingConfig, model: str, out: str, export: ExportConfig) -> str:
    """Return the command that heals the folder ``model`` with the settings ``healing`` on the run's text and writes ``out``."""
    return command_line(
        "heal",
        {
            **flags_of(replace(config.model, reference=model), always=("reference",)),
            **flags_of(config.text, always=("reference",)),
            **flags_of(healing, HealingConfig(seed=config.text.seed), always=("method", "steps")),
            "out": out,
            **flags_of(replace(export, dtype=ExportConfig().dtype)),
        },
    )

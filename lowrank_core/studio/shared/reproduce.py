"""Commands that reproduce a run or a part of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lowrank_core.config import ExportConfig, RunConfig, SearchConfig
from lowrank_core.config.flags import command_line, flags_of
from lowrank_core.presets.recipes import DEFAULT_PRESET, PRESETS, Preset, search_by
from lowrank_core.runs import JsonMapping

__all__ = ["Reproduction", "compress_command", "enqueue_command", "export_command", "reproduction", "test_command", "verify_command"]


@dataclass(frozen=True)
class Reproduction:
    """Commands that reproduce a run.

    Attributes:
        record: text of the ``run.json``.
        exact: command that takes everything from that file.
        options: command that says the same in flags.
    """

    record: str
    exact: str
    options: str


def reproduction(record: JsonMapping, config: RunConfig) -> Reproduction:
    """Return the commands that reproduce the run of ``record`` (its run.json) with ``config``."""
    folder = f"{record.get('id') or 'run'}-again"
    name, place = ("analyze", {}) if config.search is None else ("search", {"run": folder})
    text = json.dumps({**record, "id": folder, "recorded": False}, indent=1)
    return Reproduction(text, command_line(name, {"config": "run.json", **place}), command_line(name, {**_flags(config), **place}))


def export_command(run: str, trial: int, config: ExportConfig | None = None, *, out: str = "") -> str:
    """Return the command that writes the compressed model of ``trial``, in the form that ``config`` says, to ``out`` (``trial-N``…)."""
    chosen = config or ExportConfig()
    return command_line("export", {"run": run, "trial": trial, "out": out or chosen.folder_name(f"trial-{trial}"), **flags_of(chosen)})


def compress_command(config: RunConfig, ranks: str, out: str, export: ExportConfig | None = None) -> str:
    """Return the command that compresses the run's model at the ranks in the file ``ranks``, by the run's recipe.

    Empty where nothing is searched, so that there is no recipe.
    """
    if config.search is None:
        return ""
    flags = {**_shared(config), **_recipe(config.search), "ranks": ranks, "out": out}
    return command_line("compress", {**flags, **flags_of(export or ExportConfig())})


def verify_command(folder: str) -> str:
    """Return the command that measures the model in ``folder`` again in a fresh process, and compares."""
    return command_line("verify", {"model": folder})


def test_command(config: RunConfig, folder: str) -> str:
    """Return the command that measures the model in ``folder`` on test text next to the dense one."""
    text = flags_of(config.text, always=("reference", "test_windows", "context"))
    return command_line("evaluate", {"model": folder, "against": config.model.reference, **text, "split": "test"})


def enqueue_command(run: str, ranks: str) -> str:
    """Return the command that queues the ranks in the file ``ranks`` in the run at the path ``run``."""
    return command_line("enqueue", {"run": run, "ranks": ranks})


def _shared(config: RunConfig) -> dict[str, object]:
    """Return the flags of model, text and calibration; the default context depends on the model, so it is always said."""
    model = flags_of(config.model, always=("reference",))
    return {**model, **flags_of(config.text, always=("reference", "context")), **flags_of(config.calibration)}


def _flags(config: RunConfig) -> dict[str, object]:
    search = config.search
    if search is None:
        return _shared(config)
    usual = search_by(_nearest(search), search.compression_ratio, seed=config.text.seed)
    return {**_shared(config), **_recipe(search), **flags_of(search, usual, always=("compression_ratio",))}


def _recipe(search: SearchConfig) -> dict[str, object]:
    """Return the flags of a preset and of what differs from it."""
    preset = _nearest(search)
    return {"preset": preset.name, **flags_of(search.compression, preset.compression)}


def _nearest(search: SearchConfig) -> Preset:
    """Return the preset from which the fewest options differ, the default one where several do."""

    def distance(preset: Preset) -> int:
        usual = search_by(preset, search.compression_ratio, seed=search.seed)
        return len(flags_of(search.compression, preset.compression)) + len(flags_of(search, usual))

    return min([DEFAULT_PRESET, *PRESETS.values()], key=distance)

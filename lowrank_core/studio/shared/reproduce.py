"""The commands that repeat a run: the exact one from its record, and the one that says the same in options where options can."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, RunConfig, SearchConfig, TextConfig
from lowrank_core.presets.recipes import PRESETS, Preset
from lowrank_core.runs import JsonMapping

__all__ = [
    "Reproduction",
    "command_line",
    "compress_command",
    "compress_unsaid",
    "enqueue_command",
    "export_command",
    "reproduction",
    "test_command",
    "verify_command",
]

_CHOICES = ("space", "variables", "sampler", "objective", "trials", "startup_trials", "pruner", "top_k", "confirmed")
_NUMBERS = ("input_damping", "gradient_damping", "drift_beta")
_UNSAID_TEXT = ("validation_windows", "test_windows")
_UNSAID_CALIBRATION = ("group_size", "group_weights", "batch_size", "gradient_windows", "gradient_seed")


@dataclass(frozen=True)
class Reproduction:
    """How a run is repeated.

    Attributes:
        record: text of a ``run.json`` which, alone in a folder, makes a worker repeat the run.
        folder: name of that folder.
        exact: command for that folder.
        options: the command that says the same in options; empty where they can't.
        unsaid: names of what no option says, with their values; the reason why ``options`` is empty.
    """

    record: str
    folder: str
    exact: str
    options: str
    unsaid: Mapping[str, object]


def reproduction(record: JsonMapping, config: RunConfig) -> Reproduction:
    """Return how the run of ``record`` (the whole of its run.json), with ``config``, is repeated."""
    folder = f"{record.get('id') or 'run'}-again"
    unsaid = _unsaid(config)
    return Reproduction(
        record=json.dumps({**record, "id": folder, "recorded": False}, indent=1),
        folder=folder,
        exact=command_line("worker", {"run": folder}),
        options="" if unsaid else _options(config, folder),
        unsaid=unsaid,
    )


def export_command(run: str, trial: int, config: ExportConfig | None = None, *, out: str = "") -> str:
    """Return the command that writes the compressed model of ``trial``, in the form that ``config`` says, to ``out`` (``trial-N``…)."""
    chosen = config or ExportConfig()
    folder = out or chosen.folder_name(f"trial-{trial}")
    return command_line("export", {"run": run, "trial": trial, "out": folder, **chosen.options})


def compress_command(config: RunConfig, ranks: str, out: str, export: ExportConfig | None = None) -> str:
    """Return the command that compresses the run's model at the ranks in the file ``ranks``, by the run's recipe.

    Empty where no options say the recipe or the export, or nothing is searched.
    """
    export = export or ExportConfig()
    method = None if config.search is None else _method(config.search)
    if method is None or compress_unsaid(config, export):
        return ""
    return command_line("compress", {**_shared(config), **method, "ranks": ranks, "out": out, **export.options})


def compress_unsaid(config: RunConfig, export: ExportConfig) -> dict[str, object]:
    """Return what of the run's recipe, and of ``export``, no option of ``lowrank compress`` says, by its dotted name."""
    result = _unsaid(replace(config, search=None)) | _unsaid_method(config.search)
    if export.dtype != ExportConfig().dtype:  # --dtype of that command is the one it runs in
        result["export.dtype"] = export.dtype
    return result


def verify_command(folder: str) -> str:
    """Return the command that measures the model in ``folder`` again in a fresh process, and compares."""
    return command_line("verify", {"model": folder})


def test_command(config: RunConfig, folder: str) -> str:
    """Return the command that measures the model in ``folder`` on test text next to the dense one."""
    text = config.text
    cut = {"text": text.reference, "split": "test", "windows": text.test_windows, "context": text.context, "bos": text.bos}
    return command_line("evaluate", {"model": folder, "against": config.model.reference, **cut})


def command_line(name: str, options: Mapping[str, object]) -> str:
    """Return ``lowrank NAME`` with options; True stands for a flag, and what is None or False is left out."""
    words = ["lowrank", name]
    for option, value in options.items():
        if value is not None and value is not False:
            words += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def enqueue_command(run: str, ranks: str) -> str:
    """Return the command that queues the ranks in the file ``ranks`` in the run at the path ``run``."""
    return command_line("enqueue", {"run": run, "ranks": ranks})


def _shared(config: RunConfig) -> dict[str, object]:
    """Return the options of model, text and calibration, which several commands share."""
    text = config.text
    return {
        "model": config.model.reference,
        "device": config.model.device,
        "dtype": config.model.dtype,
        "text": text.reference,
        "windows": text.calibration_windows,
        "context": text.context,
        "bos": text.bos,
        "seed": text.seed,
        "robust": config.calibration.robust,
    }


def _method(search: SearchConfig) -> dict[str, object] | None:
    """Return the options of basis, storage and what goes with them; None where they can't say it."""
    base = _base_of(search)
    if base is None:
        return None
    usual = base.compression if isinstance(base, Preset) else CompressionConfig()
    numbers = {name: value for name in _NUMBERS if (value := getattr(search.compression, name)) != getattr(usual, name)}
    return {**({"preset": base.name} if isinstance(base, Preset) else base), **numbers}


def _options(config: RunConfig, folder: str) -> str:
    shared, search = _shared(config), config.search
    if search is None:
        return command_line("analyze", shared)
    method = _method(search)
    assert method is not None
    chosen = {name: getattr(search, name) for name in _CHOICES}
    flags = {"error_weights": search.error_weights, "autocast": search.autocast}
    ratios = {"compression_ratio": search.compression_ratio, "max_ratio": search.max_ratio}
    return command_line("search", {**shared, **ratios, **method, **chosen, **flags, "run": folder})


def _base_of(search: SearchConfig) -> Preset | dict[str, object] | None:
    """Return the preset that a command line names, or the options that say the method without one; None where neither does.

    A preset alone says stacks, heads, rank multiples and whether points are projected; without one these have their defaults.
    """
    compression = search.compression
    numbers = {name: getattr(compression, name) for name in _NUMBERS}
    for preset in PRESETS.values():
        if replace(preset.compression, **numbers) == compression and preset.search.get("projected", True) == search.projected:
            return preset
    own: dict[str, object] = {"basis": compression.basis, "storage": compression.storage}
    plain = replace(CompressionConfig(), **numbers, **own, value_dense=compression.value_dense)  # type: ignore[arg-type]
    if plain != compression or not search.projected:
        return None
    return own | {"no_compress_value" if compression.value_dense else "compress_value": True}


def _unsaid(config: RunConfig) -> dict[str, object]:
    """Return what differs from the defaults and has no option, by its dotted name."""
    result: dict[str, object] = {}
    for name in _UNSAID_TEXT if config.search is not None else ():  # spectra see calibration text alone
        if (value := getattr(config.text, name)) != getattr(TextConfig(), name):
            result[f"text.{name}"] = value
    for name in _UNSAID_CALIBRATION:
        if (value := getattr(config.calibration, name)) != getattr(CalibrationConfig(), name):
            result[f"calibration.{name}"] = value
    search = config.search
    if search is not None and search.seed != config.text.seed:
        result["search.seed"] = search.seed
    return result | _unsaid_method(search)


def _unsaid_method(search: SearchConfig | None) -> dict[str, object]:
    if search is None or _base_of(search) is not None:
        return {}
    usual = asdict(CompressionConfig())
    result = {f"search.compression.{name}": value for name, value in asdict(search.compression).items() if value != usual[name]}
    return result | {"search.projected": search.projected}

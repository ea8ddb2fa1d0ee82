"""Flags made from the options that configs declare, and configs made from flags.

Every command takes ``--config FILE``, the JSON that a run records (its ``run.json``, or only some sections of it): what it says
stands until a flag says otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from lowrank_core.catalogue import sentence_of
from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, ModelSource, SearchConfig, TextConfig, from_mapping
from lowrank_core.config.benchmarks import AllocationBenchmark, PaceBenchmark, QualityBenchmark, SearchBenchmark, SpeedBenchmark
from lowrank_core.config.evaluation import BehaviourConfig, EvaluationConfig, Sampling, TasksConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.options import Declared, options_of
from lowrank_core.config.serving import ServeConfig
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ConfigError
from lowrank_core.files.checkpoints import check_reference
from lowrank_core.presets.recipes import DEFAULT_PRESET, PRESETS, Preset, preset_named
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.types import Result

__all__ = [
    "Command",
    "Parser",
    "add_options",
    "check_file",
    "chosen_preset",
    "compression_options",
    "config_of",
    "estimate_option",
    "factors_of",
    "file_option",
    "given_options",
    "json_option",
    "model_options",
    "recorded",
    "source_of",
    "text_of",
    "text_options",
]


class Command(Protocol):
    """Adds a command by its name, a sentence on what it does, and the function that does it (None: its own commands have some)."""

    def __call__(self, name: str, summary: str, run: Callable[[argparse.Namespace], Result] | None = None) -> argparse.ArgumentParser: ...


T = TypeVar("T")

SECTIONS: Mapping[type, tuple[str, ...]] = {
    ModelSource: ("model",),
    TextConfig: ("text",),
    CalibrationConfig: ("calibration",),
    CompressionConfig: ("search", "compression"),
    SearchConfig: ("search",),
    ExportConfig: ("export",),
    HealingConfig: ("healing",),
    SensitivityConfig: ("sensitivity",),
    SpeedConfig: ("speed",),
    ServeConfig: ("serving",),
    EvaluationConfig: ("evaluation",),
    BehaviourConfig: ("behaviour",),
    Sampling: ("sampling",),
    TasksConfig: ("tasks",),
    QualityBenchmark: ("benchmark", "quality"),
    SearchBenchmark: ("benchmark", "search"),
    AllocationBenchmark: ("benchmark", "allocation"),
    SpeedBenchmark: ("benchmark", "speed"),
    PaceBenchmark: ("benchmark", "pace"),
}
"""Config class -> where it stands in the file of ``--config``; in the order of ``docs/options.md``."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command: how the result is printed."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def estimate_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of long commands that says how long they take."""
    parser.add_argument("--estimate", action="store_true", help="time a piece of each stage, print the seconds of all, and stop")


def file_option(parser: argparse.ArgumentParser) -> None:
    """Add the file of options of a command that takes any."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with options, such as the run.json of a run; flags come on top")


def add_options(
    parser: argparse.ArgumentParser,
    kind: type,
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for each option that ``kind`` declares.

    Args:
        only, without: names of fields to take, or to leave.
        aliases: field -> a second flag of this command.
        defaults: field -> words that ``--help`` has for the default of this command.
    """
    for declared in options_of(kind):
        if declared.name not in without and (not only or declared.name in only):
            flags = [*filter(None, [(aliases or {}).get(declared.name)]), declared.flag]
            about = {"dest": _dest(kind, declared.name), "default": None, **_about(declared, (defaults or {}).get(declared.name, ""))}
            parser.add_argument(*flags, **about)
            for old in declared.option.formerly:
                parser.add_argument(f"--{old.replace('_', '-')}", **{**about, "help": argparse.SUPPRESS})


def _dest(kind: type, name: str) -> str:
    return f"{kind.__name__}.{name}"


def _about(declared: Declared, words: str) -> dict[str, Any]:
    about, default = declared.option, declared.default
    text = f"{sentence_of(declared)} (default: {words or about.fallback or declared.typed(default)})".replace("%", "%%")
    if declared.type is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    metavar = {int: "N", float: "X"}.get(declared.type, declared.name.split("_")[-1].upper())
    if declared.type is tuple:
        return {"nargs": "+", "metavar": metavar, "help": text, "type": float if isinstance(default, tuple) and _numbers(default) else str}
    former = about.values_formerly
    return {"type": (lambda value: former.get(value, value)) if former else declared.type, "metavar": metavar, "help": text}


def _numbers(values: tuple[object, ...]) -> bool:
    return bool(values) and all(isinstance(value, float) for value in values)


def given_options(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return name -> value of the options of ``kind`` that the command line has."""
    values = ((declared, getattr(arguments, _dest(kind, declared.name), None)) for declared in options_of(kind))
    return {d.name: tuple(value) if d.type is tuple else value for d, value in values if value is not None}


def recorded(arguments: argparse.Namespace, kind: type[T]) -> T | None:
    """Return the config that the file of ``--config`` holds for ``kind``; None where there is no file, or it has no such section.

    Raises:
        ConfigError: the file can't be read, or holds what is no config.
    """
    path: Path | None = getattr(arguments, "config", None)
    if path is None:
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {path} can't be read as JSON ({error}). Give a run's run.json, or sections of one.") from error
    if not isinstance(body, dict):
        raise ConfigError(f"--config: {path} holds no JSON object. Give a run's run.json, or sections of one.")
    body = body.get("config", body)
    for name in SECTIONS[kind]:
        body = body.get(name) if isinstance(body, dict) else None
    return None if body is None else from_mapping(kind, body)


def check_file(arguments: argparse.Namespace) -> None:
    """Take the file of ``--config`` if every section that the command reads is a valid config, before anything else is asked for.

    Raises:
        ConfigError: it is not.
    """
    for kind in SECTIONS:
        if any(name.startswith(f"{kind.__name__}.") for name in vars(arguments)):
            recorded(arguments, kind)


def config_of(arguments: argparse.Namespace, kind: type[T], *, usual: T | None = None, **known: object) -> T:
    """Return the config that flags, the file of ``--config`` and ``usual`` make, in this order of precedence.

    Raises:
        ConfigError: a value out of range, or a damaged file.
    """
    base, values = recorded(arguments, kind) or usual, {**given_options(arguments, kind), **known}
    return kind(**values) if base is None else replace(base, **values)  # type: ignore[type-var]


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model, and the file of options."""
    add_options(parser, ModelSource)
    file_option(parser)


def source_of(arguments: argparse.Namespace) -> ModelSource:
    """Return the model that is asked for.

    Raises:
        ConfigError: there is none. ModelError: it is recognised as no plain language model.
    """
    if "reference" not in given_options(arguments, ModelSource) and recorded(arguments, ModelSource) is None:
        raise ConfigError("which model? Give --model demo, a folder, a GGUF file or a hub id, or --config FILE.")
    source = config_of(arguments, ModelSource)
    check_reference(source.reference)
    return source


def text_options(
    parser: argparse.ArgumentParser, windows: str = "calibration_windows", *, several: bool = False, without: str = ""
) -> None:
    """Add the options of a text, or of ``several`` cut alike.

    Args:
        windows: the field that ``--windows`` stands for.
        without: windows that are measured where no text is given, in words; empty where one has to be.
    """
    if several:
        about = next(declared.option for declared in options_of(TextConfig) if declared.name == "reference")
        parser.add_argument("--text", metavar="T", nargs="+", action="extend", help=about.help)
    add_options(
        parser, TextConfig, without=("reference",) if several else (), aliases={windows: "--windows"}, defaults={"reference": without}
    )


def text_of(arguments: argparse.Namespace, *, reference: str | None = None) -> TextConfig:
    """Return the text that is asked for, or ``reference`` cut in the same way.

    Raises:
        ConfigError: there is none, or a number is out of range.
        ModelError: the context is not given, and the model's can't be read.
    """
    given, base = given_options(arguments, TextConfig), recorded(arguments, TextConfig)
    if reference is not None:
        given["reference"] = reference
    if base is None and "reference" not in given:
        raise ConfigError("which text? Give --text python-stdlib, file:PATH or the name of a data set, or --config FILE.")
    if base is None and "context" not in given:
        from lowrank_core.commands.shared import fitting_context

        replace(TextConfig(), **given)  # a bad value is reported before the model's context is looked up
        given["context"] = fitting_context(source_of(arguments))
    return replace(base or TextConfig(), **given)


def compression_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add a preset, and the options of factors and storage."""
    parser.add_argument("--preset", metavar="P", help=f"a whole recipe: one of {', '.join(PRESETS)} (default: {default})")
    add_options(parser, CompressionConfig)
    parser.add_argument("--compress-value", action=_Opposite, dest=_dest(CompressionConfig, "value_dense"), help=argparse.SUPPRESS)


class _Opposite(argparse.BooleanOptionalAction):
    """A flag of earlier versions, whose option is called after the opposite now."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, str(option_string).startswith("--no-"))


def factors_of(arguments: argparse.Namespace, preset: Preset | None) -> CompressionConfig:
    """Return how matrices are factorised: by ``preset``, else as the file of ``--config`` says, and flags on top."""
    if preset is None:
        return config_of(arguments, CompressionConfig)
    return replace(preset.compression, **given_options(arguments, CompressionConfig))


def chosen_preset(arguments: argparse.Namespace, *own: str) -> Preset | None:
    """Return the preset that is asked for; else the default one, unless the metric, the storage or one of ``own`` is given instead."""
    if arguments.preset:
        return preset_named(arguments.preset)
    given = given_options(arguments, CompressionConfig)
    chosen = any(name in given for name in ("basis", "storage", "value_dense")) or any(getattr(arguments, name) is not None for name in own)
    return None if chosen or recorded(arguments, CompressionConfig) is not None else DEFAULT_PRESET

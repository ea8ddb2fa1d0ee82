"""Options that several commands share, and the values that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from lowrank_core.config import ROBUST_RULES, CalibrationConfig, CompressionConfig, ModelSource, TextConfig
from lowrank_core.metrics import METRICS
from lowrank_core.parameters import STORAGES
from lowrank_core.presets.recipes import DEFAULT_PRESET, PRESETS, Preset, preset_named

__all__ = [
    "Command",
    "Parser",
    "Result",
    "calibration_of",
    "calibration_options",
    "chosen_preset",
    "compression_of",
    "compression_options",
    "device_options",
    "json_option",
    "model_options",
    "source_of",
    "text_of",
    "text_options",
]

Result = dict[str, object]
"""What a command found, ready for JSON; ``text`` is for people, and not part of the JSON."""
Command = Callable[[str, str], argparse.ArgumentParser]
"""Adds a command by its name and a sentence on what it does, and returns its parser."""

_TEXT_HELP = "python-stdlib, file:PATH (.txt, .jsonl, .parquet), wikitext-2, c4, ptb, or NAME:FOLDER for a local copy of those"
_NUMBERS = {
    "input_damping": "of the inputs' metric, relative to its mean eigenvalue",
    "gradient_damping": "of the output gradients' metric, likewise",
    "drift_beta": "β of a drift-aware basis, from 0 to 1",
}
"""Numbers of ``CompressionConfig`` -> what they are."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="demo, a local folder, or a hub id")
    device_options(parser)


def device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: float32 on a CPU, the checkpoint's elsewhere)")


def source_of(arguments: argparse.Namespace) -> ModelSource:
    return ModelSource(arguments.model, arguments.device, arguments.dtype)


def text_options(
    parser: argparse.ArgumentParser, windows: str = "calibration_windows", *, required: bool = True, several: bool = False
) -> None:
    """Add the options of a text, or of ``several`` cut alike; ``windows`` is the field of ``TextConfig`` that --windows stands for."""
    defaults = TextConfig()
    if several:
        parser.add_argument("--text", required=required, metavar="T", nargs="+", action="extend", help=_TEXT_HELP)
    else:
        parser.add_argument("--text", required=required, metavar="T", help=_TEXT_HELP)
    parser.add_argument("--windows", type=int, metavar="N", help=f"{windows.replace('_', ' ')} (default: {getattr(defaults, windows)})")
    parser.add_argument(
        "--context", type=int, metavar="L", help=f"tokens in a window (default: {defaults.context}, or what the model takes if less)"
    )
    parser.add_argument("--bos", default=defaults.bos, help="auto, window or none (default: %(default)s, as the tokenizer does)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the calibration draw and the sampler (default: 0)")
    json_option(parser)


def text_of(arguments: argparse.Namespace, windows: str = "calibration_windows", *, reference: str | None = None) -> TextConfig:
    """Return the text that was asked for, or ``reference`` cut in the same way.

    Raises:
        ConfigError: a number out of range.
        ModelError: the context is not given, and the model's can't be read.
    """
    from lowrank_core.commands.shared import fitting_context

    counts = {} if arguments.windows is None else {windows: arguments.windows}
    context = fitting_context(source_of(arguments)) if arguments.context is None else arguments.context
    return TextConfig(arguments.text if reference is None else reference, context=context, bos=arguments.bos, seed=arguments.seed, **counts)


def calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--robust", default="none", metavar="RULE", help=f"pooling: one of {', '.join(ROBUST_RULES)} (default: none)")


def calibration_of(arguments: argparse.Namespace) -> CalibrationConfig:
    return CalibrationConfig(robust=arguments.robust)


def compression_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="P", help=f"a whole recipe: one of {', '.join(PRESETS)} (default: {default})")
    parser.add_argument("--basis", metavar="B", help=f"one of {', '.join(METRICS)}, or around another (shared_input:two_sided)")
    parser.add_argument("--storage", metavar="S", help=f"how factors are stored: {' or '.join(STORAGES)}")
    parser.add_argument(
        "--compress-value",
        action=argparse.BooleanOptionalAction,
        help="compress the value projections too; the paper keeps them dense",
    )
    error_weights = (
        "weigh errors by what they cost the model, measured unit by unit (for lagrangian, where a basis' errors are not comparable)"
    )
    parser.add_argument("--slopes", action="store_true", default=None, help=error_weights)
    for name, meaning in _NUMBERS.items():
        usual = getattr(CompressionConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=f"{meaning} (default: {usual:g})")


def chosen_preset(arguments: argparse.Namespace, *own: str) -> Preset | None:
    """Return the preset that was asked for; the default one, unless one of the options ``own`` was given instead."""
    if arguments.preset:
        return preset_named(arguments.preset)
    return None if any(getattr(arguments, name) is not None for name in own) else DEFAULT_PRESET


def compression_of(arguments: argparse.Namespace, preset: Preset | None) -> CompressionConfig:
    """Return the preset's choices, with those that were given instead."""
    given = {name: value for name in ("basis", "storage", *_NUMBERS) if (value := getattr(arguments, name)) is not None}
    if arguments.compress_value is not None:
        given["value_dense"] = not arguments.compress_value
    return replace(preset.compression if preset else CompressionConfig(), **given)

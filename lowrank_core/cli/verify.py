"""``lowrank verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_core.cli.options import Command, add_options, file_option, given_options, source_of, text_of, text_options
from lowrank_core.config import ModelSource, TextConfig, to_mapping
from lowrank_core.errors import ConfigError
from lowrank_core.types import Result

if TYPE_CHECKING:
    from lowrank_core.export import Verification

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("verify", "Check the files of an export, and measure its perplexity again in a fresh process.", run)
    add_options(parser, ModelSource, only=("reference", "device"))
    file_option(parser)
    text_options(parser, "test_windows", without="those that are recorded in the folder")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="part of --text (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.export import verify

    given, source = given_options(arguments, TextConfig), source_of(arguments)
    if "reference" not in given and given.keys() & {"test_windows", "context"}:
        raise ConfigError("--windows and --context cut a text: give it with --text, or leave them out to measure as was recorded.")
    text = text_of(arguments) if "reference" in given else None
    result = verify(Path(source.reference), text=text, split=arguments.split, device=source.device)
    return {**to_mapping(result), "text": _told(result)}


def _told(result: Verification) -> str:
    files = "1 file is" if result.files == 1 else f"{result.files} files are"
    lines = [f"{files} unchanged", f"perplexity {result.measured:.6f}, loaded in a fresh process"]
    if result.recorded is None:
        lines.append("no perplexity is recorded for these windows, so there is no comparison")
    else:
        verdict = "equal up to rounding" if result.ok else "DIFFERENT"
        lines.append(
            f"recorded   {result.recorded:.6f}: {verdict} (difference {result.difference:+z.2e}, tolerance {result.tolerance:.0e})"
        )
    return "\n".join([*lines, result.protocol])

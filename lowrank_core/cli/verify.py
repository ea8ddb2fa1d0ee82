"""``lowrank verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_core.cli.options import Command, Result, text_of, text_options
from lowrank_core.config import to_mapping
from lowrank_core.errors import ConfigError

if TYPE_CHECKING:
    from lowrank_core.export import Verification

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("verify", "Check the files of an export, and measure its perplexity again in a fresh process.")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder written by compress or export")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    text_options(parser, "test_windows", required=False)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="part of --text (default: %(default)s)")
    parser.set_defaults(run=run, dtype="auto")


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.export import verify

    if arguments.text is None and (arguments.windows, arguments.context) != (None, None):
        raise ConfigError("--windows and --context cut a text: give it with --text, or leave them out to measure as was recorded.")
    text = None if arguments.text is None else text_of(arguments, "test_windows")
    result = verify(Path(arguments.model), text=text, split=arguments.split, device=arguments.device)
    return {**to_mapping(result), "text": _told(result)}


def _told(result: Verification) -> str:
    lines = [f"{result.files} files are as they were exported", f"perplexity {result.measured:.6f}, loaded in a fresh process"]
    if result.recorded is None:
        lines.append("nothing is recorded for these windows: there is nothing to compare with")
    else:
        verdict = "the same to rounding" if result.ok else "NOT the same"
        lines.append(
            f"recorded   {result.recorded:.6f}: {verdict} (difference {result.difference:+z.2e}, rounding may make {result.tolerance:.0e})"
        )
    return "\n".join([*lines, result.protocol])

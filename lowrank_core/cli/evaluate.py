"""``lowrank evaluate``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, Result, model_options, source_of, text_of, text_options

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("evaluate", "Measure perplexity, and what changed against the dense model.")
    model_options(parser)
    text_options(parser, "test_windows")
    parser.add_argument("--split", choices=("validation", "test", "all"), default="test", help="part of the text (default: %(default)s)")
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, to compare with on the same windows")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands import evaluate_on

    text = text_of(arguments, "test_windows")
    return evaluate_on(source_of(arguments), text, arguments.split, arguments.windows, arguments.against)

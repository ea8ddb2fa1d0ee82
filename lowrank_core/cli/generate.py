"""``lowrank generate``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, add_options, config_of, model_options, source_of
from lowrank_core.config.evaluation import Sampling
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("generate", "Continue a prompt, optionally next to the dense model.", run)
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, continuing the same prompt")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    add_options(parser, Sampling)


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.evaluate import continue_with

    return continue_with(source_of(arguments), arguments.prompt, config_of(arguments, Sampling), arguments.against)

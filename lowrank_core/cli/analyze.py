"""``lowrank analyze``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, add_options, config_of, model_options, source_of, text_of, text_options
from lowrank_core.config import CalibrationConfig
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("analyze", "Measure spectra and feature covariances of every compressible layer.", run)
    model_options(parser)
    text_options(parser)
    add_options(parser, CalibrationConfig)
    parser.add_argument("--directions", metavar="MODULE", help="also the extreme tokens along the top directions of MODULE")
    parser.add_argument("--experts", action="store_true", help="a line for each expert, in place of a range for each mixture")
    parser.add_argument("--side", default="input", help="of its input or its output (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.analyze import analyze

    calibration = config_of(arguments, CalibrationConfig)
    wanted = (arguments.directions, arguments.side) if arguments.directions else None
    return analyze(source_of(arguments), text_of(arguments), calibration, directions=wanted, each_expert=arguments.experts)

"""``lowrank analyze``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, add_options, config_of, model_options, source_of, text_of, text_options
from lowrank_core.config import CalibrationConfig
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.overview.source_checks import local_model
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

    parser.add_argument(
        "--weights-only", action="store_true", help="singular values of the weights alone, from the file: no text, no calibration"
    )


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.analyze import analyze, analyze_weights

    if arguments.weights_only:
        source = source_of(arguments)
        place = local_model(source.reference)
        return analyze_weights(source, place, () if place is None else read_model(place).facts.matrices)
    calibration = config_of(arguments, CalibrationConfig)
    wanted = (arguments.directions, arguments.side) if arguments.directions else None
    return analyze(source_of(arguments), text_of(arguments), calibration, directions=wanted, each_expert=arguments.experts)

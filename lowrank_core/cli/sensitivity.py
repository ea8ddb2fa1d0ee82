"""``lowrank sensitivity``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.options import Command, add_options, config_of, given_options, model_options, source_of, text_of, text_options
from lowrank_core.config import CalibrationConfig, ModelSource, TextConfig
from lowrank_core.errors import ConfigError
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command(
        "sensitivity", "Measure the KL divergence of compressing each module, and each module type, alone; resumes if interrupted.", run
    )
    parser.add_argument("--run", type=Path, metavar="DIR", dest="folder", help="a run, or with --model and --text the folder of a new one")
    model_options(parser)
    text_options(parser, "validation_windows")
    add_options(parser, CalibrationConfig)
    add_options(parser, SensitivityConfig, without=("windows",))


def run(arguments: argparse.Namespace) -> Result:
    text = given_options(arguments, TextConfig)
    windows = {"windows": text["validation_windows"]} if "validation_windows" in text else {}
    config = config_of(arguments, SensitivityConfig, **windows)
    model, named = "reference" in given_options(arguments, ModelSource), "reference" in text
    if model != named and arguments.config is None:
        raise ConfigError("a new run needs both a model and a text: give --model and --text together.")
    from lowrank_core.commands.sensitivity import NewRun, sensitivity_in

    wanted = model or (arguments.folder is None and arguments.config is not None)
    new = NewRun(source_of(arguments), text_of(arguments), config_of(arguments, CalibrationConfig)) if wanted else None
    return sensitivity_in(arguments.folder, new, config)

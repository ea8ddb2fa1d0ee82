"""``lowrank sensitivity``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.options import (
    Command,
    Result,
    calibration_of,
    calibration_options,
    device_options,
    source_of,
    text_of,
    text_options,
)
from lowrank_core.errors import ConfigError
from lowrank_core.metrics import METRICS
from lowrank_core.parameters import STORAGES
from lowrank_core.sensitivity.config import SCOPES, SensitivityConfig

__all__ = ["add"]

_USUAL = SensitivityConfig()


def add(command: Command) -> None:
    parser = command(
        "sensitivity", "Measure what each module, and each type of them, costs when it alone is compressed; goes on where it was killed."
    )
    parser.add_argument("--run", type=Path, metavar="DIR", dest="folder", help="a run, or with --model and --text the folder of a new one")
    parser.add_argument("--model", metavar="M", help="demo, a local folder, or a hub id (for a new run)")
    device_options(parser)
    text_options(parser, "validation_windows", required=False)
    calibration_options(parser)
    parser.add_argument(
        "--kept", type=float, nargs="+", default=list(_USUAL.kept), metavar="K", help="kept parameter ratios (default: %(default)s)"
    )
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES), metavar="S", help=f"{' or '.join(SCOPES)} (default: both)")
    parser.add_argument("--kinds", nargs="+", default=[], metavar="T", help="module types, such as q_proj (default: all)")
    parser.add_argument("--basis", default="", metavar="B", help=f"one of {', '.join(METRICS)} (default: the run's)")
    parser.add_argument("--storage", default="", metavar="S", help=f"{' or '.join(STORAGES)} (default: the run's)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    a = arguments
    config = SensitivityConfig(tuple(a.kept), tuple(a.scopes), tuple(a.kinds), a.windows, a.basis, a.storage)
    if (a.model is None) != (a.text is None):
        raise ConfigError("a new run needs both a model and a text: give --model and --text together.")
    from lowrank_core.commands.sensitivity import NewRun, sensitivity_in

    new = None if a.model is None else NewRun(source_of(a), text_of(a, "validation_windows"), calibration_of(a))
    return sensitivity_in(a.folder, new, config)

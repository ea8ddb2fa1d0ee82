"""``lowrank heal``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.options import Command, add_options, config_of, estimate_option, model_options, source_of, text_of, text_options
from lowrank_core.config import ExportConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import ConfigError
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("heal", "Heal a compressed model: distil the dense model into its factors; resumes if interrupted.", run)
    model_options(parser)
    text_options(parser, "test_windows")
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model (default: that of the folder's manifest)")
    add_options(parser, HealingConfig)
    estimate_option(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the healed model")
    add_options(parser, ExportConfig, without=("dtype",))


def run(arguments: argparse.Namespace) -> Result:
    text = text_of(arguments)
    config = config_of(arguments, HealingConfig, usual=HealingConfig(seed=text.seed))
    written = config_of(arguments, ExportConfig)  # a bad choice is reported before torch is loaded
    if arguments.out is None and not arguments.estimate:
        raise ConfigError("where to? Give --out DIR, or --estimate to know beforehand how long it takes.")
    from lowrank_core.commands.heal import HealedFolder, estimate, heal_folder

    if arguments.estimate:
        return estimate(source_of(arguments), text, config, arguments.against)
    wanted = HealedFolder(arguments.out, arguments.against, written, arguments.line)
    return heal_folder(source_of(arguments), text, config, wanted)

"""``lowrank serve``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, add_options, config_of
from lowrank_core.config import ModelSource
from lowrank_core.config.serving import ServeConfig
from lowrank_core.files.checkpoints import check_reference
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("serve", "Serve a model on this machine: an OpenAI-compatible endpoint, until Ctrl-C.", run)
    parser.add_argument("folder", metavar="FOLDER", help="folder of an export, or any model that --model of other commands takes")
    add_options(parser, ServeConfig)
    add_options(parser, ModelSource, only=("device", "dtype"))


def run(arguments: argparse.Namespace) -> Result:
    config = config_of(arguments, ServeConfig)
    source = config_of(arguments, ModelSource, reference=arguments.folder)
    check_reference(source.reference)
    from lowrank_core.commands.serve import serve

    return serve(source, config)

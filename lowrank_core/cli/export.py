"""``lowrank export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.options import Command, Result, json_option

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("export", "Write the compressed model of a trial as a folder.")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", dest="folder", help="folder of the run")
    parser.add_argument("--trial", default="best", help="best or a trial's number (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the compressed model")
    json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.search_commands import export_from

    return export_from(arguments.folder, arguments.trial, arguments.out)

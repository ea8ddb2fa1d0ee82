"""``lowrank methods`` and ``lowrank dashboard``."""

from __future__ import annotations

import argparse
import os

from lowrank_core.catalogue import methods
from lowrank_core.cli.options import Command
from lowrank_core.cli.reference import options_reference
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    listed = command("methods", "List metrics, allocations and presets, with their sources.", run_methods)
    listed.add_argument("--options", action="store_true", help="list every option instead, as Markdown: docs/options.md")
    dashboard = command("dashboard", "Start the dashboard in the browser.", run_dashboard)
    dashboard.add_argument("--port", type=int, default=8501, metavar="P", help="port on this machine (default: %(default)s)")


def run_methods(arguments: argparse.Namespace) -> Result:
    """List what there is, or every option."""
    return {"text": options_reference()} if arguments.options else methods()


def run_dashboard(arguments: argparse.Namespace) -> Result:
    """Become Streamlit: this process is replaced, and nothing is returned."""
    from lowrank_core.runs import bundled_path
    from lowrank_core.runs.processes import python_command, python_environment

    app = bundled_path("app.py")
    os.chdir(app.parent)  # Streamlit reads its configuration from the working directory
    command = python_command("-m", "streamlit", "run", str(app), "--server.port", str(arguments.port))
    os.execve(command[0], command, python_environment())

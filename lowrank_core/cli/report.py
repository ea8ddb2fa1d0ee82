"""``lowrank report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.options import Command
from lowrank_core.types import Result
from lowrank_core.wording import amount

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("report", "Write a run as one self-contained HTML file: charts, tables, protocol, versions, seeds.", run)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", dest="folder", help="folder of the run, also of the recorded one")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="HTML file, replaced if it exists (default: report.html in the run's folder; for the recorded run, in the current folder)",
    )


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.runs import open_run
    from lowrank_core.studio.report import write_report

    result = open_run(arguments.folder)
    folder = Path.cwd() if result.recorded else result.path  # what ships with the package is only looked at
    out: Path = (arguments.out or folder / "report.html").absolute()
    size = write_report(result, out)
    return {"out": str(out), "bytes": size, "run": str(result.path), "text": f"Wrote {out} ({amount(size)}): open it in any browser."}

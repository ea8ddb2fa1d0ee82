"""Discovery of runs."""

from __future__ import annotations

import os
from pathlib import Path

from lowrank_core.errors import LowRankError
from lowrank_core.runs.paths import bundled_path, home
from lowrank_core.runs.run import Run

__all__ = ["list_runs", "open_run", "recorded_run"]


def open_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in ``path``.

    Raises:
        RunError: there is none.
    """
    run = Run(Path(path).absolute())
    _ = run.config
    return run


def recorded_run() -> Run | None:
    """Return the bundled recorded run."""
    run = Run(bundled_path("assets", "recorded-run"))
    return run if (run.path / "run.json").exists() else None


def list_runs() -> list[Run]:
    """Return the runs under the home, the newest first; damaged ones are left out."""
    folder = home() / "runs"
    result = []
    for path in folder.glob("[!.]*") if folder.is_dir() else ():  # a run that is being deleted begins with a dot
        try:
            run = open_run(path)
            result.append((float(run.record["created"]), run))
        except (LowRankError, KeyError, TypeError, ValueError):
            continue
    return [run for _, run in sorted(result, key=lambda pair: pair[0], reverse=True)]

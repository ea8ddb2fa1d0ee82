"""Renaming, annotating and deleting runs. Torch-free.

Deleting is the one thing here that can't be undone: it refuses whatever is not a run under the home, a run that ships with the package, and
one whose worker lives.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from lowrank_core.errors import RunError
from lowrank_core.runs import Run, home, read_json, write_json

__all__ = ["check_deletable", "delete_run", "notes_of", "rename_run", "run_bytes", "write_notes"]

_MAX_NAME, _MAX_NOTES = 200, 20_000  # characters


def rename_run(run: Run, name: str) -> None:
    """Change the display name of ``run``; its folder stays.

    Raises:
        RunError: it is a recorded one, the name is empty or too long, or run.json can't be written.
    """
    run.refuse_if_recorded()
    name = " ".join(name.split())
    if not 1 <= len(name) <= _MAX_NAME:
        raise RunError(f"a run's name must have 1 to {_MAX_NAME} characters, got {len(name)}.")
    write_json(run.path / "run.json", {**run.record, "name": name})


def notes_of(run: Run) -> str:
    """Return the user's notes on ``run``; empty without any.

    Raises:
        RunError: the file is damaged.
    """
    body = read_json(run.path / "notes.json")
    return "" if body is None else str(body.get("notes", ""))


def write_notes(run: Run, notes: str) -> None:
    """Save ``notes`` with ``run``.

    Raises:
        RunError: it is a recorded one, the notes are too long, or can't be written.
    """
    run.refuse_if_recorded()
    if len(notes) > _MAX_NOTES:
        raise RunError(f"notes can have {_MAX_NOTES:,} characters, these have {len(notes):,}. Put the rest into a file of your own.")
    write_json(run.path / "notes.json", {"notes": notes.strip()})


def run_bytes(run: Run) -> int:
    """Return the disk usage of ``run``; links are not followed."""
    return sum(path.lstat().st_size for path in run.path.rglob("*") if path.is_file() and not path.is_symlink())


def check_deletable(run: Run) -> None:
    """Raise unless ``run`` may be deleted.

    Raises:
        RunError: it is a recorded one, lies outside the home, or a worker holds it.
    """
    run.refuse_if_recorded()
    if run.path.is_symlink() or run.path.resolve().parent != (home() / "runs").resolve():
        raise RunError(f"{run.path} is not in {home() / 'runs'}: only runs there are deleted from here. Remove the folder manually.")
    if not (run.path / "run.json").is_file():
        raise RunError(f"{run.path} is no run: it has no run.json.")
    if run.worker_alive() or run.further_workers():
        raise RunError("a worker holds this run. Stop it, or release its memory, and wait until it has ended.")


def delete_run(run: Run) -> None:
    """Delete the folder of ``run``; statistics in the home stay, as runs share them.

    Raises:
        RunError: as ``check_deletable``, or a file can't be removed.
    """
    check_deletable(run)
    doomed = Path(run.path.parent / f".deleted-{run.id}-{secrets.token_hex(2)}")
    try:
        run.path.rename(doomed)  # gone at once for whoever lists runs, however long the rest takes
        shutil.rmtree(doomed)
    except OSError as error:
        raise RunError(f"{run.path} could not be deleted entirely: {error.strerror}. Remove what is left of it manually.") from error

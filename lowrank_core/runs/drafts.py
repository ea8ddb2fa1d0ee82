"""Rank drafts on disk, a small file per author: reloads find them, and nobody overwrites another's.

A file is named by a token that the address of the page carries. Who opens the address sees the draft; who then changes it writes a file
of their own, under a new token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank_core.allocation import Draft, DraftHistory
from lowrank_core.errors import RunError
from lowrank_core.parameters import Unit
from lowrank_core.runs import Run, home, read_json, write_json

__all__ = ["has_draft", "load_draft", "new_token", "save_draft"]

_TOKEN = re.compile(r"[0-9a-f]{12}")
_MAX_FILES = 200


def new_token() -> str:
    return secrets.token_hex(6)


def _folder(run: Run) -> Path:
    """Return the folder of drafts of ``run``: in the run, or under the home for a bundled one."""
    return home() / "drafts" / run.id if run.recorded else run.path / "drafts"


def has_draft(run: Run, token: str) -> bool:
    return bool(_TOKEN.fullmatch(token)) and (_folder(run) / f"{token}.json").is_file()


def save_draft(run: Run, token: str, history: DraftHistory) -> None:
    """Save the draft and its starting point; beyond a few hundred drafts of a run the oldest are deleted.

    Raises:
        RunError: the disk is full or read-only.
    """
    folder = _folder(run)
    write_json(folder / f"{token}.json", {"draft": _body(history.present), "start": _body(history.start)})
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[:-_MAX_FILES]:
        path.unlink(missing_ok=True)


def _body(draft: Draft) -> dict[str, object]:
    return {"ranks": dict(draft.ranks), "locked": sorted(draft.locked)}


def load_draft(run: Run, token: str, units: Sequence[Unit], *, rank_multiple: int = 1) -> DraftHistory | None:
    """Return the draft ``token`` of ``run``, without its steps; None without one.

    Raises:
        RunError: the file is damaged.
        ConfigError, RankError: its ranks are not those of ``units``.
    """
    if not has_draft(run, token):
        return None
    path = _folder(run) / f"{token}.json"
    body = read_json(path) or {}
    draft, start = (_draft(body.get(part), path, units, rank_multiple) for part in ("draft", "start"))
    return DraftHistory(start, draft)


def _draft(body: object, path: Path, units: Sequence[Unit], rank_multiple: int) -> Draft:
    ranks = body.get("ranks") if isinstance(body, Mapping) else None
    locked = body.get("locked") if isinstance(body, Mapping) else None
    if not isinstance(ranks, dict) or not isinstance(locked, list) or not all(r is None or type(r) is int for r in ranks.values()):
        raise RunError(f"{path} holds no draft. Delete the file, and begin another one.")
    return Draft.of(units, ranks, locked=locked, rank_multiple=rank_multiple)

"""Allocation files: what a program writes, what people edit, and which of their ranks are meant to stay."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.allocation.base import Ranks
from lowrank_core.errors import ConfigError, RankError
from lowrank_core.files.foreign import foreign_ranks

__all__ = ["AllocationFile", "parse_allocation", "read_allocation", "read_ranks"]


@dataclass(frozen=True)
class AllocationFile:
    """Ranks by unit name, and the names whose ranks an allocator must not change."""

    ranks: Ranks
    locked: tuple[str, ...]

    @property
    def fixed(self) -> dict[str, int | None]:
        """The locked ranks alone, as ``allocate`` takes them."""
        return {name: self.ranks[name] for name in self.locked}


def parse_allocation(text: str, source: str) -> AllocationFile:
    """Read ``{layer: rank or null}``, or ``{"ranks": {…}, "locked": [layers]}``; without ``locked``, every rank is.

    A file that LEMS, ASVD or LowRankArena wrote (``files.foreign``), such as the ``config.json`` of a model, gives the ranks in it.

    Args:
        source: what to call the text in an error: a path, or the name of an upload.

    Raises:
        ConfigError: the text is not JSON or holds anything else, or a locked layer has no rank.
        RankError: a rank below 1.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"ranks: {source} is not JSON ({error}). Give an allocation file, or a JSON object of ranks.") from error
    foreign = foreign_ranks(body) if isinstance(body, dict) else None
    ranks = foreign if foreign is not None else body.get("ranks", body) if isinstance(body, dict) else None
    if not isinstance(ranks, dict):
        raise ConfigError(f"ranks: {source} must hold a JSON object that maps layer names to a whole number or null (dense).")
    for name, rank in ranks.items():
        _check_rank(name, rank, source)
    locked = body.get("locked", list(ranks)) if ranks is not body else list(ranks)
    return AllocationFile(ranks, _checked_names(locked, ranks, source))


def _check_rank(name: str, rank: object, source: str) -> None:
    if rank is not None and type(rank) is not int:
        raise ConfigError(f"ranks: {source} gives {name} the rank {json.dumps(rank)}. Write a whole number, or null where it stays dense.")
    if rank is not None and rank < 1:
        raise RankError(f"ranks: {source} gives {name} the rank {rank}. Write at least 1, or null where it stays dense.")


def _checked_names(locked: object, ranks: Mapping[str, object], source: str) -> tuple[str, ...]:
    if not isinstance(locked, list) or not all(isinstance(name, str) for name in locked):
        raise ConfigError(f"ranks: `locked` in {source} must be a list of layer names. Leave it out to lock every rank.")
    missing = [name for name in locked if name not in ranks]
    if missing:
        raise ConfigError(f"ranks: {source} locks {missing[0]!r} and gives it no rank. Add one under `ranks`, or take it out of `locked`.")
    return tuple(dict.fromkeys(locked))


def read_allocation(path: str | os.PathLike[str]) -> AllocationFile:
    """Read an allocation file, as ``parse_allocation``.

    Raises:
        ConfigError: as ``parse_allocation``, or the file can't be read.
        RankError: a rank below 1.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"ranks: can't read {path}: {error}.") from error
    return parse_allocation(text, str(path))


def read_ranks(path: str | os.PathLike[str]) -> dict[str, int | None]:
    """Return the ranks of an allocation file, locked or not.

    Raises:
        as ``read_allocation``.
    """
    return dict(read_allocation(path).ranks)

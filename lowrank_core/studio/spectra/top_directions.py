"""Tokens along the top directions of a module, from the worker's results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.runs import JsonMapping
from lowrank_core.spectra.directions import Direction, Directions
from lowrank_core.studio.compare.comparison import argument_of

__all__ = ["DirectionFacts", "direction_facts", "direction_failure"]

_SIGNS = str.maketrans({"\n": "↵", "\r": "", "\t": "⇥"})


@dataclass(frozen=True)
class DirectionFacts:
    """Extreme tokens along the top directions of one side of a module.

    Attributes:
        protocol: on which text.
        frame: a row for each token: direction (from 1), share (of all energy, in [0, 1]), token, context (the token between ⟦ ⟧;
            several spaces are one), projection (in standard deviations along the direction).
    """

    protocol: str
    frame: pd.DataFrame


def direction_facts(bodies: Sequence[JsonMapping], module: str, side: str) -> DirectionFacts | None:
    """Return the newest result for one side of ``module``; None without one.

    Raises:
        RunError: it is damaged.
    """
    mine = [body for body in _told(bodies, module, side) if body.get("ok")]
    if not mine:
        return None
    result = build(Directions, mine[-1], "an answer")
    rows = [row for direction in result.directions for row in _rows(direction)]
    return DirectionFacts(result.protocol, pd.DataFrame(rows, columns=["direction", "share", "token", "context", "projection"]))


def direction_failure(bodies: Sequence[JsonMapping], module: str, side: str) -> str | None:
    """Return the error of the newest request for one side of ``module``; None if it succeeded."""
    mine = _told(bodies, module, side)
    return None if not mine or mine[-1].get("ok") else str(mine[-1].get("error") or "no reason given")


def _told(bodies: Sequence[JsonMapping], module: str, side: str) -> list[JsonMapping]:
    asked = (body for body in bodies if body.get("kind") == "directions" and argument_of(body, "module") == module)
    return [body for body in asked if (argument_of(body, "side") or "input") == side]


def _rows(direction: Direction) -> list[dict[str, object]]:
    return [
        {
            "direction": direction.number,
            "share": direction.share,
            "token": _visible(hit.token),
            "context": re.sub(" +", " ", f"{hit.before}⟦{hit.token}⟧{hit.after}").translate(_SIGNS),
            "projection": hit.projection,
        }
        for hit in direction.tokens
    ]


def _visible(token: str) -> str:
    """Return a token with visible white space at its ends."""
    body = token.strip(" ")
    lead = len(token) - len(token.lstrip(" "))
    return ("␣" * lead + body + "␣" * (len(token) - lead - len(body))).translate(_SIGNS)

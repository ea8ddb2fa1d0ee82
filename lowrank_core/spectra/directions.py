"""The top directions of a module as they are reported: written by the worker, read by pages. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Direction", "Directions", "TokenHit"]


@dataclass(frozen=True)
class TokenHit:
    """A token in its context, and its projection in standard deviations; the sign is that of the direction, whose strongest is positive."""

    token: str
    before: str
    after: str
    projection: float


@dataclass(frozen=True)
class Direction:
    """One direction, ``number`` from 1; ``share`` is λ_i over the sum of all, in (0, 1]."""

    number: int
    share: float
    tokens: tuple[TokenHit, ...]


@dataclass(frozen=True)
class Directions:
    """The top directions of one side of a module, and how they were measured."""

    module: str
    side: str
    protocol: str
    directions: tuple[Direction, ...]

    def to_text(self) -> str:
        """Return the same for a terminal: a line for each direction."""
        lines = [f"Top directions of the {self.side} of {self.module} ({self.protocol}); projections in standard deviations:"]
        for direction in self.directions:
            words = ", ".join(f"{hit.token!r} {hit.projection:+z.1f}" for hit in direction.tokens)
            lines.append(f"{direction.number:>4} {direction.share:>7.1%}  {words}")
        return "\n".join(lines)

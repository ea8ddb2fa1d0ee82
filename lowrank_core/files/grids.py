"""Grids of whole numbers that weights are rounded to, and their bytes on disk. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["GRIDS", "Grid"]

_HALF_BYTES = 2
"""Of a scale in float16."""


@dataclass(frozen=True)
class Grid:
    """Whole numbers times scales: W_ij ~ s_ik q_ij, k the group of the column j.

    Attributes:
        name: of the grid, in options and records.
        bits: of a number: in 8, q from -127 to 127; in 4, q from -8 to 7, two in a byte.
        group: columns of a row that share one scale; 0 where a whole row does. The last group of a row may be shorter.
    """

    name: str
    bits: int
    group: int = 0

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest q."""
        return (-127, 127) if self.bits == 8 else (-8, 7)

    def scales(self, columns: int) -> int:
        """Return how many scales a row of ``columns`` numbers has."""
        return -(-columns // self.group) if self.group else 1

    def width(self, columns: int) -> int:
        """Return the bytes of the numbers of one row; an odd row of 4-bit numbers ends with half a byte of padding."""
        return columns if self.bits == 8 else -(-columns // 2)

    def bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of a matrix; a scale takes two in 4 bits, and ``itemsize``, that of a float in the file, in 8."""
        scale = itemsize if self.bits == 8 else _HALF_BYTES
        return rows * (self.width(columns) + scale * self.scales(columns))


GRIDS: Mapping[str, Grid] = MappingProxyType({grid.name: grid for grid in (Grid("int8", 8), Grid("int4", 4, 64), Grid("int4_128", 4, 128))})
"""Name -> grid."""

"""The same kept fraction everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_core.accounting import MatrixShape

__all__ = ["UNIFORM", "Uniform"]


@dataclass(frozen=True)
class Uniform:
    """Every matrix keeps the same fraction of its parameters."""

    name: str = "uniform"
    label: str = "Uniform"
    reference: str = "the usual baseline"

    def multipliers(self, matrices: Sequence[MatrixShape]) -> dict[str, float]:
        return {matrix.name: 1.0 for matrix in matrices}


UNIFORM = Uniform()

"""What an allocation is, what an allocator is given, and the files that people write by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lowrank_core.accounting import Unit, allocated_parameters, budget_for_ratio, compression_ratio, dense_parameters
from lowrank_core.errors import BudgetError, ConfigError

__all__ = [
    "AllocationProblem",
    "Allocator",
    "ErrorCurves",
    "RankAllocation",
    "Ranks",
    "allocation_from_ranks",
    "module_group",
    "read_ranks",
    "unreachable",
]

Ranks = Mapping[str, int | None]
"""Unit name -> rank, None where it stays dense."""

ErrorCurves = Mapping[str, npt.NDArray[np.float64]]
"""Unit name -> errors e_0 … e_k left at each rank, in one unit for all."""

_GROUPS = {"q_proj": "qk", "k_proj": "qk", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def module_group(kind: str) -> str:
    """Return the group that shares a variable of the search: q and k together as in the paper, else the type itself."""
    return "+".join(dict.fromkeys(_GROUPS.get(part, part) for part in kind.split("+")))


@dataclass(frozen=True)
class RankAllocation:
    """Ranks that meet a budget. ``ranks[unit]`` is None where it stays dense, and so does what no unit covers."""

    allocator: str
    ranks: Ranks
    parameters: int
    dense_parameters: int

    @property
    def compression_ratio(self) -> float:
        """Fraction of the compressible linears' parameters removed."""
        return compression_ratio(self.dense_parameters, self.parameters)

    def to_json(self) -> str:
        body = {
            "allocator": self.allocator,
            "compression_ratio": self.compression_ratio,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "ranks": dict(self.ranks),
        }
        return json.dumps(body, indent=1)


@dataclass(frozen=True)
class AllocationProblem:
    """What is to be shared out, and among whom.

    Attributes:
        units: every unit, alternatives and what stays dense included: the ratio counts each of their matrices once.
        compression_ratio: fraction of the parameters to remove, in [0, 1).
        keep_dense: names of matrices that stay as they are.
        curves: errors by unit, where they are known.
    """

    units: tuple[Unit, ...]
    compression_ratio: float
    keep_dense: frozenset[str] = frozenset()
    curves: ErrorCurves | None = None

    @property
    def free(self) -> tuple[Unit, ...]:
        """Units that may be compressed, at a gain."""
        return tuple(u for u in self.units if u.break_even_rank > 0 and not any(m.name in self.keep_dense for m in u.members))

    @property
    def available(self) -> int:
        """Parameters for the matrices of the free units: the budget without what the others cost."""
        return budget_for_ratio(self.units, self.compression_ratio) - dense_parameters(self.units) + dense_parameters(self.free)


def unreachable(problem: AllocationProblem, least: int) -> BudgetError:
    """Return the error for a budget below ``least``, what the free units cost at rank 1."""
    dense = dense_parameters(problem.units)
    most = compression_ratio(dense, dense - dense_parameters(problem.free) + least)
    return BudgetError(
        f"compression ratio {problem.compression_ratio:g} can't be met: the matrices that stay dense, with rank 1 everywhere else, "
        f"remove only {most:.3f}. "
        "Lower the ratio, or compress the value projections too."
    )


class Allocator(Protocol):
    """A rule that spends a budget: never over it, and under it by less than the cheapest step that is left."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def needs_curves(self) -> bool:
        """Whether it works from the errors of the bases."""

    def ranks(self, problem: AllocationProblem) -> Ranks:
        """Return the rank of each unit that is used, None where it stays dense.

        Raises:
            BudgetError: the ratio can't be met.
            ConfigError: it needs errors and there are none, or it can't choose between alternatives.
        """


def allocation_from_ranks(allocator: str, units: Sequence[Unit], ranks: Ranks) -> RankAllocation:
    """Return ``ranks`` as an allocation, with its counts.

    A rank whose factors would cost as much as the matrices is stored dense: never larger than dense.

    Raises:
        ConfigError: a name that is no unit, or a matrix in two of them.
        RankError: a rank outside its limits.
    """
    known = {unit.name: unit for unit in units}
    unknown = sorted(set(ranks) - set(known))
    if unknown:
        raise ConfigError(f"ranks: {unknown[0]!r} is no compressible layer of this model; its layers are named like {next(iter(known))!r}.")
    kept: dict[str, int | None] = {}
    for name, rank in ranks.items():
        cost = known[name].parameters(rank)  # checks the rank
        kept[name] = rank if cost < known[name].dense_parameters else None
    covered = {member.name for name in kept for member in known[name].members}
    kept |= {unit.name: None for unit in units if len(unit.members) == 1 and unit.name not in covered}
    ordered = {unit.name: kept[unit.name] for unit in units if unit.name in kept}
    return RankAllocation(allocator, ordered, allocated_parameters(units, ordered), dense_parameters(units))


def read_ranks(path: str | os.PathLike[str]) -> dict[str, int | None]:
    """Read ``{layer: rank or null}``, or an allocation file that holds it under ``ranks``.

    Raises:
        ConfigError: the file is missing, is not JSON or holds anything else.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"ranks: can't read {path}: {error}.") from error
    ranks = body.get("ranks", body) if isinstance(body, dict) else None
    if not isinstance(ranks, dict) or not all(value is None or type(value) is int for value in ranks.values()):
        raise ConfigError(f"ranks: {path} must hold a JSON object that maps layer names to a whole number or null (dense).")
    return ranks

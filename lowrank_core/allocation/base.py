"""Protocol and result of an allocator."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lowrank_core.errors import ConfigError
from lowrank_core.parameters import Ranks, Unit, allocated_parameters, compression_ratio, dense_parameters

__all__ = ["ErrorCurves", "Perplexities", "RankAllocation", "Ranks", "allocation_from_ranks", "module_group", "round_down", "units_by_name"]

ErrorCurves = Mapping[str, npt.NDArray[np.float64]]
"""Unit name -> errors e_0 … e_k left at each rank, in one unit for all."""

Perplexities = Mapping[str, Mapping[float, float]]
"""Unit name -> kept fraction -> perplexity of the model with that unit alone cut so far; infinite where it diverges."""

_GROUPS = {"q_proj": "qk", "k_proj": "qk", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def module_group(kind: str) -> str:
    """Return the group that shares a variable of the search: q and k together as in the paper, else the type itself."""
    return "+".join(dict.fromkeys(_GROUPS.get(part, part) for part in kind.split("+")))


@dataclass(frozen=True)
class RankAllocation:
    """Ranks that meet a budget.

    Attributes:
        label: what it is called: the allocator's name, ``trial 3``, ``manual``.
        ranks: by unit; None where it stays dense, and so does what no unit covers.
        locked: the units whose ranks a user chose; the others are the allocator's.
        allocator: the rule that chose; empty where none did, or it is not known.
        grids: layer -> the grid that its matrices are rounded to, factors or dense, of a budget of bytes; others are floats.
    """

    label: str
    ranks: Ranks
    parameters: int
    dense_parameters: int
    locked: tuple[str, ...] = ()
    allocator: str = ""
    grids: Mapping[str, str] = field(default_factory=dict)

    @property
    def compression_ratio(self) -> float:
        """Fraction of the compressible linears' parameters removed."""
        return compression_ratio(self.dense_parameters, self.parameters)

    def to_json(self) -> str:
        """Return the text of an allocation file, as ``parse_allocation`` reads it; ``locked`` is left out where nothing is."""
        body = {
            "allocator": self.label,
            "compression_ratio": self.compression_ratio,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "ranks": dict(self.ranks),
        }
        if self.locked:
            body["locked"] = list(self.locked)
        return json.dumps(body, indent=1)


def round_down(rank: int, multiple: int) -> int:
    """Return ``rank`` rounded down to a multiple of ``multiple``; a smaller one stays, so that no rank rises."""
    return rank if rank < multiple else rank - rank % multiple


def units_by_name(units: Sequence[Unit], named: Collection[str], what: str = "ranks") -> dict[str, Unit]:
    """Return the units by name, all of ``named`` among them.

    Raises:
        ConfigError: a name that is no unit.
    """
    known = {unit.name: unit for unit in units}
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise ConfigError(
            f"{what}: {unknown[0]!r} is no compressible layer of this model; its layers are named like {next(iter(known), '')!r}."
        )
    return known


def allocation_from_ranks(
    label: str, units: Sequence[Unit], ranks: Ranks, *, locked: Collection[str] = (), allocator: str = ""
) -> RankAllocation:
    """Return ``ranks`` as an allocation, with its counts.

    A rank whose factors would cost as much as the matrices is stored dense: never larger than dense.

    Raises:
        ConfigError: a name that is no unit, or a matrix in two of them.
        RankError: a rank outside its limits.
    """
    known = units_by_name(units, ranks)
    kept: dict[str, int | None] = {}
    for name, rank in ranks.items():
        cost = known[name].parameters(rank)  # checks the rank
        kept[name] = rank if cost < known[name].dense_parameters else None
    covered = {member.name for name in kept for member in known[name].members}
    kept |= {unit.name: None for unit in units if len(unit.members) == 1 and unit.name not in covered}
    ordered = {unit.name: kept[unit.name] for unit in units if unit.name in kept}
    names = tuple(name for name in ordered if name in locked)
    return RankAllocation(label, ordered, allocated_parameters(units, ordered), dense_parameters(units), names, allocator)

"""Priced units and error curves for tests of allocators, and the best there is by trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from lowrank_core.allocation import ErrorCurves
from lowrank_core.parameters import STORAGES, HeadUnit, MatrixShape, Unit

__all__ = [
    "Curve",
    "brute_force",
    "cheapest_step",
    "choices",
    "decaying",
    "error_of",
    "falling",
    "following",
    "hull_steps",
    "kept_dense",
    "measured_of",
    "models",
    "perplexities_of",
    "single",
]

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn"]
Curve = npt.NDArray[np.float64]


def single(name: str, d_out: int = 64, d_in: int = 64, *, kind: str = "", storage: str = "factored", bias: bool = False) -> Unit:
    return Unit((MatrixShape(name, kind or name, 0, d_out, d_in, bias),), storage)


@st.composite
def models(draw: st.DrawFn, *, maximum: int = 8, least_size: int = 4, size: int = 200) -> tuple[Unit, ...]:
    """Single matrices, stacks and heads, in one storage."""
    storage, adds_bias = draw(st.sampled_from(sorted(STORAGES))), draw(st.booleans())
    sizes, flags = st.integers(least_size, size), st.booleans()
    result: list[Unit] = []
    for index in range(draw(st.integers(1, maximum))):
        form = draw(st.sampled_from(["single", "single", "stack", "heads"]))
        kind, d_in = draw(st.sampled_from(KINDS)), draw(sizes)
        if form == "heads":
            groups, repeat, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 6))
            value = MatrixShape(f"{index}.v", "v_proj", index, groups * dim, max(d_in, 2 * dim), draw(flags))
            output = MatrixShape(f"{index}.o", "o_proj", index, draw(sizes), groups * repeat * dim, draw(flags))
            result.append(HeadUnit((value, output), storage, adds_bias, heads=groups * repeat, groups=groups, head_dim=dim))
        else:
            count = draw(st.integers(2, 3)) if form == "stack" else 1
            members = (MatrixShape(f"{index}.{i}", kind, index, draw(sizes), d_in, draw(flags)) for i in range(count))
            result.append(Unit(tuple(members), storage, adds_bias))
    return tuple(result)


def following(unit: Unit, rank: int) -> int | None:
    return rank + 1 if rank < unit.break_even_rank else None


def cheapest_step(units: Sequence[Unit], ranks: dict[str, int | None]) -> int | None:
    """Return the cheapest single step that is left: a rank more, or dense."""
    steps = [unit.parameters(following(unit, rank)) - unit.parameters(rank) for unit in units if (rank := ranks.get(unit.name)) is not None]
    return min(steps, default=None)


def kept_dense(unit: Unit, keep: set[str]) -> bool:
    return any(member.name in keep for member in unit.members) or unit.break_even_rank == 0


def decaying(unit: Unit, rate: float, scale: float = 1.0) -> Curve:
    curve: Curve = scale * rate ** np.arange(unit.max_rank + 1, dtype=np.float64)
    curve[-1] = 0.0
    return curve


def falling(unit: Unit, seed: int, scale: float = 1.0) -> Curve:
    """Return the tail sums of random energies in descending order: as spectra are."""
    energies = np.sort(np.random.default_rng(seed).exponential(size=unit.max_rank) ** 3)[::-1]
    return np.append(energies[::-1].cumsum()[::-1], 0.0) * scale


def perplexities_of(units: Sequence[Unit], seed: int = 0) -> dict[str, dict[float, float]]:
    """Return the perplexity of a model with each unit alone cut on ASVD's grid; the deeper the cut, the larger, but for noise."""
    noise = np.random.default_rng(seed)
    return {u.name: {step / 10: 10 + noise.exponential() * (10 - step) + noise.normal() for step in range(1, 10)} for u in units}


def measured_of(units: Sequence[Unit]) -> dict[str, Any]:
    """Return arguments of ``allocate`` that rules need to be measured, of a model that minds the errors of all units alike."""
    return {"perplexities": perplexities_of(units), "weights": {unit.name: 1.0 for unit in units}}


def choices(unit: Unit, curve: Curve) -> list[tuple[int, float]]:
    """Return (cost, error) of every rank below break-even, and of dense."""
    ranks = range(1, unit.break_even_rank + 1)
    return [(unit.parameters(rank), float(curve[rank])) for rank in ranks] + [(unit.dense_parameters, 0.0)]


def error_of(units: Sequence[Unit], curves: ErrorCurves, ranks: dict[str, int | None]) -> float:
    return sum(float(curves[unit.name][rank]) for unit in units if (rank := ranks.get(unit.name)) is not None)


def brute_force(units: Sequence[Unit], curves: ErrorCurves, budget: float) -> float:
    """Return the least error that any choice within the budget leaves; infinite where none fits."""
    every = itertools.product(*(choices(unit, curves[unit.name]) for unit in units))
    return min((sum(e for _, e in picked) for picked in every if sum(c for c, _ in picked) <= budget), default=float("inf"))


def hull_steps(unit: Unit, curve: Curve) -> list[int]:
    """Return the costs of the steps between points on the lower hull of a curve."""
    hull: list[tuple[int, float]] = []
    for cost, error in choices(unit, curve):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (cost - hull[-2][0]) >= (error - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((cost, error))
    return [after - before for (before, _), (after, _) in itertools.pairwise(hull)]

"""Errors that grids add to those of truncation, in the metric of a model's decompositions: what a budget of bytes trades.

Notation::

    Ŵ_r, Q_r   the matrix that is stored at rank r (or W, dense), and the same with what is stored on a grid
    q(r)       scale · [tr(P^γ ΔW C ΔWᵀ) + (ΔW μ)ᵀ P^γ ΔW μ],  ΔW = Ŵ_r - Q_r

The second term is of a centred metric alone: no bias makes up for what rounding shifts. q is measured at a few ranks, on the very layers
that would be stored, and log q is interpolated in between.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lowrank_core.allocation.byte_budget import RoundingErrors
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.compression.quantization import Moments, quantizable, round_layers
from lowrank_core.decomposition.factorization import row_metric
from lowrank_core.decomposition.units import damping_of, operand_of
from lowrank_core.files.grids import GRIDS, Grid
from lowrank_core.layers.forms import build_layers
from lowrank_core.linalg import times
from lowrank_core.models.handle import weight_of
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.types import Progress

__all__ = ["OFFERED", "rounding_errors"]

OFFERED = ("int8", "int4")
"""Grids that a budget of bytes chooses from, next to floats."""

_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Of the break-even rank: where q is measured, rank 1 first."""

_KEPT = 8
"""Layers whose metric is kept: those of a stack and of its members follow each other."""


def rounding_errors(
    decomposed: Decomposed, dtype: torch.dtype, moments: Moments | None, *, progress: Progress | None = None
) -> RoundingErrors:
    """Return q of every unit but per-head ones, whose metric is of both projections together: these are offered in floats only.

    Args:
        dtype: of the floats as they are written.
        moments: round by GPTQ; to nearest without them.

    Raises:
        NumericalError: a matrix has no place on a grid; names the layer.
    """
    measure, result = _Measure(decomposed, dtype, moments), {}
    for done, unit in enumerate(decomposed.units, start=1):
        if not unit.joint:
            result[unit.name] = {name: measure.errors(unit, GRIDS[name]) for name in OFFERED}
        if progress is not None:
            progress(done, len(decomposed.units))
    return result


class _Measure:
    """Measures what rounding costs units of one model."""

    def __init__(self, decomposed: Decomposed, dtype: torch.dtype, moments: Moments | None) -> None:
        self._decomposed, self._dtype, self._moments = decomposed, dtype, moments
        self._weighing = lru_cache(_KEPT)(self._weigh)

    def errors(self, unit: Unit, grid: Grid) -> npt.NDArray[np.float64]:
        """Return q at the ranks 1 … break-even, then dense (break-even + 1,)."""
        last = unit.break_even_rank
        ranks = sorted({max(1, round(share * last)) for share in _SHARES if last})
        measured = [self._at(unit, rank, grid) for rank in ranks]
        logarithms = np.log(np.maximum(measured, np.finfo(np.float64).tiny))
        between = np.exp(np.interp(np.arange(1, last + 1), ranks, logarithms)) if ranks else np.zeros(0)
        return np.append(between, self._at(unit, None, grid))

    def _at(self, unit: Unit, rank: int | None, grid: Grid) -> float:
        names = [member.name for member in unit.members]
        dense = {name: self._decomposed.handle.module.get_submodule(name) for name in names}
        exact: Mapping[str, nn.Module] = dense
        if rank is not None:
            factors = self._decomposed.bases[unit.name].slice(rank)
            exact = build_layers(names, factors, unit.storage, [weight_of(layer) for layer in dense.values()])
        layers = {name: quantizable(layer) for name, layer in copy.deepcopy(exact).items()}
        round_layers(layers, exact, dict.fromkeys(names, grid), self._dtype, self._moments)
        changes = [(weight_of(exact[name]) - layers[name].weight).detach().to("cpu", torch.float64) for name in names]
        return sum(self._weighed(member, change) for member, change in zip(unit.members, changes, strict=True))

    def _weighed(self, member: MatrixShape, change: Tensor) -> float:
        rows, columns, mean, scale = self._weighing(member)
        heavy = change if rows is None else times(rows, change)
        spread = change if columns is None else times(columns, change.T).T
        total = (heavy * spread).sum()
        if mean is not None:
            total = total + (change @ mean) @ (heavy @ mean)
        return scale * float(total)

    def _weigh(self, member: MatrixShape) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
        """Return P^γ, damped as where the unit was decomposed, C, μ of a centred metric, and the scale."""
        decomposed = self._decomposed
        operand = operand_of(decomposed.handle, decomposed.statistics, member)
        metric = decomposed.basis.metric(operand)
        rows = row_metric(metric, damping_of(decomposed.config), member.name)
        mean = operand.inputs.mean if decomposed.basis.centred else None
        return None if rows is None else rows.matrix, metric.columns, mean, metric.scale

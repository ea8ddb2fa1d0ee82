"""Measured error weights ΔKL/Δe, for metrics whose errors are not comparable (docs/methods.md §5).

Notation::

    e_u(r)   error of unit u at rank r, in the basis' own metric; dense leaves none
    w_u      ΔKL / Δe of u alone: the KL divergence to the dense model (nats per token) over e_u(r), at the rank r of a uniform allocation,
             or of a deep cut: a tenth of the break-even rank, as LEMS measures it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from lowrank_core.allocation import Ranks
from lowrank_core.compression.cut_passes import CutPasses
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import DenseReference
from lowrank_core.parameters import Unit
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["measure_error_weights"]

_MIN_KL = 1e-9
"""Nats per token; a smaller or negative divergence is rounding, and a weight must be positive."""

_NONE: Mapping[str, float] = MappingProxyType({})

_DEEP = 0.1
"""Of the break-even rank."""

_MIN_ERROR = 1e-9
"""Relative to e_0: an error that is rounding of zero has no slope."""


def measure_error_weights(
    decomposed: Decomposed,
    windows: WindowSet,
    dense_reference: DenseReference,
    *,
    compression_ratio: float,
    deep: bool = False,
    batch_size: int = 8,
    fixed: Ranks | None = None,
    known: Mapping[str, float] = _NONE,
    keep: Callable[[str, float], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return w_u of every unit that an allocator is free to choose, alternatives included, for ``Decomposed.allocate``.

    Each unit is compressed alone, everything else dense: one pass over ``windows`` from its block on for each. Scaling the errors of a
    unit by c divides its weight by c, so the allocation does not depend on their units.

    Args:
        windows: the text to measure on; not the test text.
        dense_reference: of the dense model on the same windows, in batches of ``batch_size``.
        compression_ratio: of the uniform allocation whose ranks are measured.
        deep: measure at a deep cut instead; then the ratio changes nothing.
        fixed: ranks that the user chose; those units, and what shares a matrix with them, are not measured.
        known: weights that are not measured again; keep: is given each of the others once it is measured.
        progress: called with (units done, units).

    Raises:
        ConfigError, RankError: ``fixed`` are not ranks of these units.
        NumericalError: the model diverges; names the unit.
    """
    problem = decomposed.problem(compression_ratio, fixed=fixed)
    passes = CutPasses(decomposed, windows, batch_size, dense_reference)
    error_weights: dict[str, float] = {}
    for done, unit in enumerate(sorted(problem.free, key=lambda unit: min(member.depth for member in unit.members)), start=1):
        if unit.name in known:
            error_weights[unit.name] = known[unit.name]
        else:
            errors = decomposed.bases[unit.name].errors.numpy()
            rank = _measured_rank(errors, _deep_rank(unit) if deep else _uniform_rank(unit, problem.kept_share))
            error_weights[unit.name] = 1.0 if rank is None else _kl(passes, unit, rank) / float(errors[rank])
            if keep is not None:
                keep(unit.name, error_weights[unit.name])
        if progress is not None:
            progress(done, len(problem.free))
    return error_weights


def _uniform_rank(unit: Unit, kept: float) -> int:
    return unit.rank_for_parameters(kept * unit.dense_parameters) or unit.break_even_rank


def _deep_rank(unit: Unit) -> int:
    return max(1, round(_DEEP * unit.break_even_rank))


def _measured_rank(errors: npt.NDArray[np.float64], rank: int) -> int | None:
    """Return ``rank``, or the largest below it that leaves an error; None where none does: then there is nothing to weigh."""
    left = np.flatnonzero(errors[1 : rank + 1] > _MIN_ERROR * errors[0])
    return int(left[-1]) + 1 if len(left) else None


def _kl(passes: CutPasses, unit: Unit, rank: int) -> float:
    try:
        parts = [scores.kl for scores in passes.scores(unit.name, rank) if scores.kl is not None]
    except NumericalError as error:
        raise NumericalError(f"{unit.name} at rank {rank}, everything else dense: {error}") from error
    kl = float(torch.cat(parts).mean())
    if not math.isfinite(kl):
        raise NumericalError(f"{unit.name} at rank {rank}, everything else dense: the KL divergence is not finite. Keep it dense.")
    return max(_MIN_KL, kl)

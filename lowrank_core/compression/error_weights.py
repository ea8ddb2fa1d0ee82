"""Measured error weights ΔKL/Δe, for metrics whose errors are not comparable (docs/methods.md §5).

Notation::

    e_u(r)   error of unit u at rank r, in the basis' own metric; dense leaves none
    w_u      ΔKL / Δe of u alone: the KL divergence to the dense model (nats per token) over e_u(r), at the rank r of a uniform allocation,
             or of a deep cut: a tenth of the break-even rank, as LEMS measures it
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lowrank_core.allocation import Ranks
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.parameters import Unit
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["measure_error_weights"]

_MIN_KL = 1e-9
"""Nats per token; a smaller or negative divergence is rounding, and a weight must be positive."""

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
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return w_u of every unit that an allocator is free to choose, alternatives included, for ``Decomposed.allocate``.

    Each unit is compressed alone, everything else dense: one pass over ``windows`` for each. Scaling the errors of a unit by c divides
    its weight by c, so the allocation does not depend on their units.

    Args:
        windows: the text to measure on; not the test text.
        dense_reference: of the dense model on the same windows, in batches of ``batch_size``.
        compression_ratio: of the uniform allocation whose ranks are measured.
        deep: measure at a deep cut instead; then the ratio changes nothing.
        fixed: ranks that the user chose; those units, and what shares a matrix with them, are not measured.
        progress: called with (units done, units).

    Raises:
        ConfigError, RankError: ``fixed`` are not ranks of these units.
        NumericalError: the model diverges; names the unit.
    """
    problem = decomposed.problem(compression_ratio, fixed=fixed)
    error_weights: dict[str, float] = {}
    for done, unit in enumerate(problem.free, start=1):
        errors = decomposed.bases[unit.name].errors.numpy()
        rank = _measured_rank(errors, _deep_rank(unit) if deep else _uniform_rank(unit, problem.kept_share))
        error_weights[unit.name] = (
            1.0 if rank is None else _kl(decomposed, unit, rank, windows, dense_reference, batch_size) / float(errors[rank])
        )
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


def _kl(decomposed: Decomposed, unit: Unit, rank: int, windows: WindowSet, dense: DenseReference, batch_size: int) -> float:
    try:
        with decomposed.swapped({unit.name: rank}):
            scores, _ = score_windows(decomposed.handle, windows, batch_size=batch_size, dense=dense)
    except NumericalError as error:
        raise NumericalError(f"{unit.name} at rank {rank}, everything else dense: {error}") from error
    assert scores.kl is not None
    kl = float(scores.kl.mean())
    if not math.isfinite(kl):
        raise NumericalError(f"{unit.name} at rank {rank}, everything else dense: the KL divergence is not finite. Keep it dense.")
    return max(_MIN_KL, kl)

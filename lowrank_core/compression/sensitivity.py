"""One cell: the divergence from the dense model where some matrices alone are compressed."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.sensitivity.planning import PlannedCell
from lowrank_core.sensitivity.records import SensitivityCell
from lowrank_core.text.windows import WindowSet

__all__ = ["evenly_spaced", "measured_cell"]


def evenly_spaced(windows: WindowSet, count: int | None) -> WindowSet:
    """Return ``count`` windows of a set, evenly spaced and in its order; all where there are no more, or where it is None."""
    if count is None or count >= windows.windows:
        return windows
    chosen = torch.linspace(0, windows.windows - 1, count, dtype=torch.float64).round().long()
    return replace(windows, ids=windows.ids[chosen], scored=None if windows.scored is None else windows.scored[chosen])


def measured_cell(
    decomposed: Decomposed, planned: PlannedCell, windows: WindowSet, dense: DenseReference, *, batch_size: int = 8
) -> SensitivityCell:
    """Return the KL divergence of the model with the matrices of ``planned`` at their ranks, everything else dense.

    The dense layers are back afterwards, the very same ones. A model that diverges makes a cell that says so.

    Args:
        decomposed: units of single matrices, at least those of ``planned``.
        windows: the text to measure on; not the test text.
        dense: of the dense model on the same windows, in batches of ``batch_size``.

    Raises:
        ConfigError, RankError: the ranks are not of these units.
    """
    began = time.perf_counter()
    kl, stderr, reason = None, None, ""
    try:
        kl, stderr = _divergence(decomposed, planned, windows, dense, batch_size)
    except NumericalError as error:
        reason = str(error)
    return SensitivityCell(
        scope=planned.scope,
        name=planned.name,
        kept=planned.kept,
        rank=min(planned.ranks.values()),
        matrices=len(planned.ranks),
        parameters=planned.parameters,
        dense_parameters=planned.dense_parameters,
        kl=kl,
        kl_stderr=stderr,
        predicted=_predicted(decomposed, planned),
        seconds=time.perf_counter() - began,
        error=reason,
    )


def _divergence(
    decomposed: Decomposed, planned: PlannedCell, windows: WindowSet, dense: DenseReference, batch_size: int
) -> tuple[float, float | None]:
    """Return the mean over windows and its standard error.

    Raises:
        NumericalError: a factor or a loss is not finite.
    """
    with decomposed.swapped(planned.ranks):
        scores, _ = score_windows(decomposed.handle, windows, batch_size=batch_size, dense=dense)
    assert scores.kl is not None
    losses = scores.kl.double()
    kl = float(losses.mean())
    if not math.isfinite(kl):
        raise NumericalError("the KL divergence is not finite.")
    return kl, float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None


def _predicted(decomposed: Decomposed, planned: PlannedCell) -> float | None:
    """Return Σ e(r), where errors are second-order estimates of the divergence."""
    if not decomposed.basis.comparable:
        return None
    return sum(float(decomposed.bases[name].errors[rank]) for name, rank in planned.ranks.items())

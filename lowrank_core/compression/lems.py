"""Measurements of the allocation ``lems``: scales at a deep cut, then a depth bias by ten trials (``allocation.lems``)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.allocation import DepthBias, Ranks
from lowrank_core.allocation.lems import TRIALS
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.compression.truncations import cuts_key
from lowrank_core.errors import NumericalError, RunError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.files.lines import append_line, whole_lines
from lowrank_core.statistics.store import exclusive
from lowrank_core.studies.depth_trials import best_depth_bias
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["LemsMeasurement", "cached_scales", "measure_depth_bias"]

_FORMAT = 1
_FILE = "scales.jsonl"

Measure = Callable[[Mapping[str, float], Callable[[str, float], None]], Mapping[str, float]]
"""Scales that are known, and where each of the others is kept once it is measured -> all."""


def cached_scales(decomposed: Decomposed, calibration: WindowSet, windows: WindowSet, store: Path, measure: Measure) -> dict[str, float]:
    """Return κ_u / e_u(r_0) of every free unit, kept in ``store`` line by line; what is there is not measured again, at any ratio.

    Args:
        calibration: the windows that the factors rest on; windows: those that are measured on.
        measure: ``measure_error_weights`` at a deep cut; not called where all scales are known.

    Raises:
        as ``measure``; RunError where the file of earlier measurements is damaged, or can't be written.
    """
    about = [windows.sha256, windows.context, decomposed.config.storage]
    folder = store / cuts_key(decomposed, calibration, "scales", _FORMAT, *about)
    with exclusive(folder, lambda: None):
        known = _read(folder / _FILE)
        if not {unit.name for unit in decomposed.problem(0.0).free} <= known.keys():
            known |= measure(known, lambda unit, scale: append_line(folder / _FILE, {"unit": unit, "scale": scale}))
    return known


def _read(path: Path) -> dict[str, float]:
    try:
        entries = [json.loads(line) for line in whole_lines(path)]
        result = {str(entry["unit"]): float(entry["scale"]) for entry in entries}
        if not all(0 < scale < math.inf for scale in result.values()):
            raise ValueError("a scale is not positive")
        return result
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}. Delete the file to measure again.") from error


@dataclass(frozen=True)
class LemsMeasurement:
    """The depth bias of the smallest measured loss.

    Attributes:
        bias: α and γ.
        kl: that the allocation left, nats per token.
        weights: of the errors of units, for ``Decomposed.allocate``.
    """

    bias: DepthBias
    kl: float
    weights: Mapping[str, float]


def measure_depth_bias(
    decomposed: Decomposed,
    windows: WindowSet,
    dense_reference: DenseReference,
    scales: Mapping[str, float],
    *,
    compression_ratio: float,
    batch_size: int = 8,
    fixed: Ranks | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LemsMeasurement:
    """Measure ten depth biases of the allocation ``lems`` at ``compression_ratio``: a pass over ``windows`` for each.

    Args:
        windows: the text to measure on; not the test text.
        dense_reference: of the dense model on the same windows, in batches of ``batch_size``.
        scales: κ_u / e_u(r_0) of every free unit: ``measure_error_weights`` with ``deep``.
        fixed: ranks that the user chose.
        progress: called with (trials done, trials).

    Raises:
        as ``Decomposed.allocate``; NumericalError also where the model diverges at every bias.
    """
    done = 0

    def loss(bias: DepthBias) -> float:
        nonlocal done
        weights = bias.weights(decomposed.units, scales)
        ranks = decomposed.allocate("lems", compression_ratio, fixed=fixed, weights=weights).ranks
        result = _divergence(decomposed, ranks, windows, dense_reference, batch_size)
        done += 1
        if progress is not None:
            progress(done, TRIALS)
        return result

    bias, kl = best_depth_bias(loss, seed=seed)
    if not math.isfinite(kl):
        raise NumericalError("the compressed model diverged at every depth bias that was tried. Lower the compression ratio.")
    return LemsMeasurement(bias, kl, bias.weights(decomposed.units, scales))


def _divergence(decomposed: Decomposed, ranks: Ranks, windows: WindowSet, dense: DenseReference, batch_size: int) -> float:
    try:
        with decomposed.swapped(ranks):
            scores, _ = score_windows(decomposed.handle, windows, batch_size=batch_size, dense=dense)
    except NumericalError:
        return math.inf
    assert scores.kl is not None
    kl = float(scores.kl.mean())
    return kl if math.isfinite(kl) else math.inf

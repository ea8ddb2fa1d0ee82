"""The perplexity of the model with one unit at a time cut: what ASVD's search for ranks works from. arXiv 2312.05821, §3.4.

Each unit is cut alone to every kept fraction of ``KEPT``, everything else dense: a pass over the first ``WINDOWS`` calibration windows for
each. A pass begins at the block that is cut, with the dense hidden states before it: about half of the work. The passes do not depend on
the ratio. They are kept line by line under a name that says what they were measured on, so that an interrupted measurement goes on where it
was, and the next ratio measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from lowrank_core.allocation import AllocationProblem, Perplexities, allocator_named
from lowrank_core.compression.cut_passes import CutPasses
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.decomposition.units import shrinkage_of
from lowrank_core.errors import NumericalError, RunError
from lowrank_core.files.lines import append_line, whole_lines
from lowrank_core.parameters import Unit
from lowrank_core.statistics.calibration import statistics_key
from lowrank_core.statistics.gradients import gradients_key
from lowrank_core.statistics.store import exclusive
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["KEPT", "WINDOWS", "Truncation", "cost_in_words", "cuts_key", "measured_perplexities", "perplexities_for", "planned_truncations"]

KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Kept fractions of the paper's grid. The published code began with these, and dropped those below 0.4 later to save time."""

WINDOWS = 32
"""Calibration samples of the published code (``n_calib_samples``), which are 2048 tokens long there."""

_FORMAT = 1
_FILE = "perplexities.jsonl"


@dataclass(frozen=True)
class Truncation:
    """One measurement: ``unit`` alone at ``rank``, the largest that keeps at most ``kept`` of its parameters.

    ``perplexity`` is None before it was measured, and infinite where the model diverged.
    """

    unit: str
    kept: float
    rank: int
    perplexity: float | None = None


def planned_truncations(units: Sequence[Unit]) -> tuple[Truncation, ...]:
    """Return the cuts of ``units`` that make them smaller, in the order of the model and of ``KEPT``."""
    ranks = ((unit, kept, unit.rank_for_parameters(kept * unit.dense_parameters)) for unit in units for kept in KEPT)
    return tuple(Truncation(unit.name, kept, rank) for unit, kept, rank in ranks if rank is not None)


def cost_in_words(decomposed: Decomposed, calibration: WindowSet) -> str:
    """Return how much there is to measure: ``504 passes over 32 windows``."""
    return f"{len(planned_truncations(_free(decomposed)))} passes over {calibration.first(WINDOWS).windows} windows"


def perplexities_for(
    allocator: str, decomposed: Decomposed, calibration: WindowSet, store: Path, *, progress: Progress | None = None
) -> Perplexities:
    """Return what the allocator ``allocator`` needs of ``measured_perplexities``: nothing, without measuring, for all but ASVD's.

    Raises:
        as ``measured_perplexities``; ConfigError also where there is no such allocator.
    """
    if not allocator_named(allocator).needs_perplexities:
        return {}
    return measured_perplexities(decomposed, calibration, store, progress=progress)


def measured_perplexities(decomposed: Decomposed, calibration: WindowSet, store: Path, *, progress: Progress | None = None) -> Perplexities:
    """Return the perplexity of the model with each unit alone at each kept fraction; those that ``store`` has are not measured again.

    Args:
        calibration: the windows that the statistics rest on.
        store: folder of statistics by their content. Where another process is at the same measurement, this one waits for it.
        progress: called with (cuts done, cuts); what it raises ends the measurement, and what was measured is kept.

    Raises:
        ConfigError: units are alternatives of each other, between which this search can't choose.
        RunError: the file of earlier measurements is damaged, or can't be written.
    """
    planned, folder = planned_truncations(_free(decomposed)), store / cuts_key(decomposed, calibration, "truncations", _FORMAT, WINDOWS)
    bench = _Bench(decomposed, calibration.first(WINDOWS), decomposed.statistics.config.batch_size)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(planned))

    with exclusive(folder, lambda: tell(0)):
        known = {(result.unit, result.rank): result.perplexity for result in _read(folder / _FILE)}
        for done, cut in enumerate(planned):
            tell(done)
            if (cut.unit, cut.rank) not in known:
                known[cut.unit, cut.rank] = bench.perplexity(cut)
                append_line(folder / _FILE, {**asdict(cut), "perplexity": known[cut.unit, cut.rank]})
        tell(len(planned))
    table: dict[str, dict[float, float]] = {unit.name: {} for unit in _free(decomposed)}
    for cut in planned:
        result = known[cut.unit, cut.rank]
        table[cut.unit][cut.kept] = math.inf if result is None else result
    return table


def _free(decomposed: Decomposed) -> tuple[Unit, ...]:
    return AllocationProblem(decomposed.units, 0.0, frozenset(decomposed.keep_dense)).without_alternatives()


def cuts_key(decomposed: Decomposed, calibration: WindowSet, kind: str, format: int, *about: object) -> str:
    """Return the name of measurements with units cut: a hash of model, dtype, tokens, what the factors are made of, and ``about``."""
    handle, config, statistics = decomposed.handle, decomposed.config, decomposed.statistics
    robust = config.robust_gradients
    gradients = gradients_key(handle, calibration, statistics.config, robust=robust) if decomposed.basis.needs_gradients else ""
    parts = [kind, format, statistics_key(handle, calibration, statistics.config), gradients, *about, str(handle.module.dtype)]
    parts += [config.basis, config.input_damping, config.gradient_damping, *shrinkage_of(config)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class _Bench(CutPasses):
    """Cuts measured by their perplexity."""

    def perplexity(self, cut: Truncation) -> float | None:
        """Return the perplexity of the model with ``cut``; None where it diverges."""
        try:
            losses = torch.cat([scores.nll for scores in self.scores(cut.unit, cut.rank)])
        except NumericalError:
            return None
        result = float(np.exp(losses.double().mean().item()))
        return result if math.isfinite(result) else None


def _read(path: Path) -> list[Truncation]:
    """Return the measurements in ``path``, but a torn last line.

    Raises:
        RunError: it is damaged.
    """
    return [_parsed(path, number, line) for number, line in enumerate(whole_lines(path), start=1)]


def _parsed(path: Path, number: int, line: bytes) -> Truncation:
    try:
        body = json.loads(line)
        result = Truncation(**{field.name: body[field.name] for field in fields(Truncation)})
        if type(result.unit) is not str or type(result.rank) is not int or not _is_perplexity(result.perplexity):
            raise ValueError(f"{line[:80]!r}")
        return result
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(f"{path} is damaged in line {number}: {error}. Delete the file to measure again.") from error


def _is_perplexity(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isfinite(value) and value > 0)

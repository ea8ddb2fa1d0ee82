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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_core.allocation import AllocationProblem, Perplexities, allocator_named
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.decomposition.units import shrinkage_of
from lowrank_core.errors import NumericalError, RunError
from lowrank_core.evaluation import score_windows
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.parameters import Unit
from lowrank_core.statistics.calibration import statistics_key
from lowrank_core.statistics.gradients import gradients_key
from lowrank_core.statistics.store import exclusive
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["KEPT", "WINDOWS", "Truncation", "cost_in_words", "measured_perplexities", "perplexities_for", "planned_truncations"]

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
    planned, folder = planned_truncations(_free(decomposed)), store / _key(decomposed, calibration)
    bench = _Bench(decomposed, calibration.first(WINDOWS))

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(planned))

    with exclusive(folder, lambda: tell(0)):
        known = {(result.unit, result.rank): result.perplexity for result in _read(folder / _FILE)}
        for done, cut in enumerate(planned):
            tell(done)
            if (cut.unit, cut.rank) not in known:
                known[cut.unit, cut.rank] = bench.perplexity(cut)
                _append(folder / _FILE, cut, known[cut.unit, cut.rank])
        tell(len(planned))
    table: dict[str, dict[float, float]] = {unit.name: {} for unit in _free(decomposed)}
    for cut in planned:
        result = known[cut.unit, cut.rank]
        table[cut.unit][cut.kept] = math.inf if result is None else result
    return table


def _free(decomposed: Decomposed) -> tuple[Unit, ...]:
    return AllocationProblem(decomposed.units, 0.0, frozenset(decomposed.keep_dense)).without_alternatives()


def _key(decomposed: Decomposed, calibration: WindowSet) -> str:
    """Return the name of these measurements: a hash of model, dtype, tokens, and what the factors are made of."""
    handle, config, statistics = decomposed.handle, decomposed.config, decomposed.statistics
    robust = config.robust_gradients
    gradients = gradients_key(handle, calibration, statistics.config, robust=robust) if decomposed.basis.needs_gradients else ""
    parts = ["truncations", _FORMAT, statistics_key(handle, calibration, statistics.config), gradients, WINDOWS, str(handle.module.dtype)]
    parts += [config.basis, config.input_damping, config.gradient_damping, *shrinkage_of(config)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class _Bench:
    """The dense model, and its hidden states before the current block, batch by batch; cuts come in the order of the model."""

    def __init__(self, decomposed: Decomposed, windows: WindowSet) -> None:
        size = decomposed.statistics.config.batch_size
        self._decomposed, self._runner, self._block = decomposed, BlockRunner(decomposed.handle), 0
        self._batches = [replace(windows, ids=ids) for ids in torch.split(windows.ids, size)]
        self._states: list[Tensor | None] = [None] * len(self._batches)
        self._depths = {unit.name: min(member.depth for member in unit.members) for unit in decomposed.units}

    def perplexity(self, cut: Truncation) -> float | None:
        """Return the perplexity of the model with ``cut``; None where it diverges."""
        self._advance(self._depths[cut.unit])
        try:
            with self._decomposed.swapped({cut.unit: cut.rank}):
                losses = torch.cat([self._losses(batch, state) for batch, state in zip(self._batches, self._states, strict=True)])
        except NumericalError:
            return None
        result = float(np.exp(losses.double().mean().item()))
        return result if math.isfinite(result) else None

    def _losses(self, batch: WindowSet, state: Tensor | None) -> Tensor:
        with self._runner.beginning_at(self._block, state):
            scores, _ = score_windows(self._decomposed.handle, batch, batch_size=batch.windows)
        return scores.nll

    @torch.no_grad()
    def _advance(self, block: int) -> None:
        """Take the dense hidden states to ``block``, where blocks can be chained; else every pass begins with the tokens."""
        for index in range(self._block, block) if self._runner.chained else ():
            for number, batch in enumerate(self._batches):
                self._states[number] = self._runner.run(index, batch.ids, self._states[number]).cpu()
        self._block = max(block, self._block)


def _append(path: Path, cut: Truncation, perplexity: float | None) -> None:
    """Add a line; a torn one, which a killed process left, is cut off first."""
    line = json.dumps({**asdict(cut), "perplexity": perplexity}, allow_nan=False) + "\n"
    with path.open("a+b") as stream:
        stream.truncate(path.read_bytes().rfind(b"\n") + 1)
        stream.write(line.encode())


def _read(path: Path) -> list[Truncation]:
    """Return the measurements in ``path``, but a torn last line.

    Raises:
        RunError: it is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parsed(path, number, line) for number, line in enumerate(lines, start=1)]


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

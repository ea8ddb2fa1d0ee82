"""Cost of a planned sensitivity measurement, and the state of the current one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_core.config import CompressionConfig
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import JsonMapping, Run, read_json
from lowrank_core.runs.client import BACKGROUND, pending_requests
from lowrank_core.sensitivity.config import SensitivityConfig, single_compression
from lowrank_core.sensitivity.planning import planned_cells
from lowrank_core.sensitivity.records import SensitivityRecord, read_records
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.overview.text_facts import text_facts

__all__ = ["SensitivityPlan", "last_answer", "plan_of", "usual_compression", "waiting_request"]


@dataclass(frozen=True)
class SensitivityPlan:
    """A planned measurement.

    Attributes:
        cells: asked for; missing: those that are not measured yet under this setting.
        windows, tokens: that each is measured on.
        seconds: estimate for the missing ones; None where there is nothing to go by.
        source: what the estimate goes by.
        skipped: matrices that no rank makes smaller.
    """

    cells: int
    missing: int
    windows: int
    tokens: int
    seconds: float | None
    source: str
    skipped: int


def usual_compression(run: Run) -> CompressionConfig:
    """Return the default factorisation of single matrices in this run."""
    search = run.config.search
    return single_compression(search.compression if search is not None else CompressionConfig(), SensitivityConfig())


def plan_of(run: Run, matrices: Sequence[MatrixShape], config: SensitivityConfig) -> SensitivityPlan:
    """Return the plan of ``config`` in ``run``.

    Raises:
        ConfigError: no such type or basis.
        RunError: a record is damaged.
    """
    text = run.config.text
    available = _validation_windows(run)
    windows = min(config.windows or available, available)
    tokens = windows * (text.context - 1)
    compression = single_compression(usual_compression(run), config)
    planned = planned_cells(matrices, compression, config)
    records = read_records(run)
    known = {cell.key for record in records if _is_of(record, compression, windows) for cell in record.cells}
    missing = sum(cell.key not in known for cell in planned)
    rate, source = _seconds_per_token(run, records)
    priced = planned_cells(matrices, compression, SensitivityConfig(kept=(0.5,), scopes=("module",)))
    skipped = len(matrices) - len(priced)
    seconds = None if rate is None else rate * tokens * missing
    return SensitivityPlan(len(planned), missing, windows, tokens, seconds, source, skipped)


def _validation_windows(run: Run) -> int:
    """Return how many the run has, as far as it knows: a short text holds fewer than were asked for."""
    facts = text_facts(run)
    result = next((split.windows for split in facts.splits if split.name == "validation"), None) if facts else None
    return run.config.text.validation_windows if result is None else result


def _is_of(record: SensitivityRecord, compression: CompressionConfig, windows: int) -> bool:
    """Whether cells of ``record`` would not be measured again: what a setting shares with ``compression``."""
    setting = record.setting
    names = ("basis", "storage", "input_damping", "gradient_damping")
    return setting.windows == windows and all(getattr(setting, name) == getattr(compression, name) for name in names)


def _seconds_per_token(run: Run, records: Sequence[SensitivityRecord]) -> tuple[float | None, str]:
    """Return the median seconds per token of measured cells, else of trials, and its source."""
    if records:
        result = [cell.seconds / record.setting.tokens for record in records for cell in record.cells]
        return statistics.median(result), "the cells measured so far"
    trials = read_trials(run) if run.config.search is not None else []
    rates = [t.seconds / t.tokens for t in trials if t.finished and t.seconds is not None and t.tokens]
    return (statistics.median(rates), "the trials of this run") if rates else (None, "")


def waiting_request(run: Run) -> JsonMapping | None:
    """Return the queued or running request; None without one.

    Raises:
        RunError: a request is damaged.
    """
    return next((dict(request) for request in pending_requests(run) if request.get("kind") in BACKGROUND), None)


def last_answer(run: Run) -> Mapping[str, object] | None:
    """Return the newest sensitivity result; None without one.

    Raises:
        RunError: an answer is damaged.
    """
    paths = sorted((run.path / "results").glob("[0-9]*.json"), reverse=True)
    return next((body for path in paths if (body := read_json(path)) is not None and body.get("kind") in BACKGROUND), None)

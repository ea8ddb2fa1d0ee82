"""What several commands of ``lowrank`` share: how progress is shown, and the calibration that they begin with."""

from __future__ import annotations

import sys
from contextlib import nullcontext

from lowrank_core.compression.pipeline import with_gradients
from lowrank_core.config import CalibrationConfig, ModelSource, TextConfig
from lowrank_core.models import ModelHandle, max_context
from lowrank_core.runs import statistics_home
from lowrank_core.statistics.calibration import LayerStatistics, cached_statistics
from lowrank_core.text import WindowSet
from lowrank_core.types import Progress

__all__ = ["calibrated", "coverage_warnings", "fitting_context", "progress_line"]


def progress_line(label: str) -> Progress:
    """Return a callback that keeps one line on a terminal, and is silent elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{label} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


def fitting_context(source: ModelSource) -> int:
    """Return the default context, or what the model takes if that is less."""
    return min(TextConfig().context, max_context(source.reference) or TextConfig().context)


def coverage_warnings(handle: ModelHandle, compression_ratio: float | None = None) -> tuple[str, ...]:
    """Tell, before work is spent, that most of a model can't be compressed; return what was reported."""
    warning = handle.coverage.warning(compression_ratio)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return () if warning is None else (warning,)


def calibrated(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, basis: str | None = None) -> LayerStatistics:
    """Return the statistics of ``windows``, with what ``basis`` needs; what a user should know of them is reported."""
    statistics, _ = cached_statistics(handle, windows, config, statistics_home(), progress=progress_line("Calibrating"))
    if basis is not None:
        gradients = nullcontext(progress_line("Measuring gradients"))
        statistics = with_gradients(handle, statistics, windows, (basis,), measuring=gradients)
    for warning in statistics.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return statistics

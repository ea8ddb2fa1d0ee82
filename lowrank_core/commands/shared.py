"""Progress and warnings as commands print them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.models import ModelHandle, max_context
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.types import Progress

__all__ = ["coverage_warnings", "fitting_context", "progress_line", "progress_stage", "reported", "warn"]


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


def warn(*warnings: str) -> tuple[str, ...]:
    """Print ``warnings`` on stderr, and return them."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return warnings


def coverage_warnings(handle: ModelHandle, compression_ratio: float | None = None) -> tuple[str, ...]:
    """Tell, before work is spent, that most of a model can't be compressed; return what was reported."""
    warning = handle.coverage.warning(compression_ratio)
    return () if warning is None else warn(warning)


def progress_stage(name: str, total: int = 0) -> AbstractContextManager[Progress]:
    """Report the stages of a ``Pipeline`` in lines of a terminal."""
    return nullcontext(progress_line(name))


def reported(statistics: LayerStatistics) -> LayerStatistics:
    """Return ``statistics``; what a user should know of them is reported."""
    warn(*statistics.warnings())
    return statistics

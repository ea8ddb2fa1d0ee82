"""Progress and warnings as commands print them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import RunError
from lowrank_core.models import ModelHandle, max_context
from lowrank_core.runs.stage_times import TimeEstimate, estimated, remember, work_of
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.types import Progress, Result
from lowrank_core.wording import duration
from lowrank_core.worker.pace import FinishedStage, LogLines, StageClock

__all__ = ["Stages", "coverage_warnings", "estimate_result", "estimate_words", "fitting_context", "progress_line", "reported", "warn"]


class _Line:
    """Progress of a stage: one line that is overwritten on a terminal, elsewhere a line every half minute."""

    def __init__(self, label: str, total: int = 0, clock: StageClock | None = None) -> None:
        self._clock = clock or StageClock()
        self._clock.begin(label, total)
        self._log = LogLines(self._clock)
        self.tick = self._log.tick

    def __call__(self, done: int, total: int) -> None:
        self._clock.step(done, total)
        self.tick()
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{self._clock.words}\033[K", end=end, file=sys.stderr, flush=True)


def progress_line(label: str) -> Progress:
    """Return a callback that keeps one line on a terminal, and adds one every half minute elsewhere."""
    return _Line(label)


class Stages:
    """Stages of a command: said on stderr while they run, timed, and kept in the machine's record."""

    def __init__(self) -> None:
        self._clock = StageClock()
        self._source, self._work = ModelSource(), dict[str, float]()

    def plan(self, pipeline: Pipeline, stages: Sequence[str]) -> None:
        """Number the ``stages`` of ``pipeline`` from now on, and say what is left by the machine's record."""
        self._source, self._work = pipeline.source, _work(pipeline)
        self._clock.plan = estimated(pipeline.source, self._work, stages, kept=pipeline.kept_stages())
        for took in self._clock.finished:
            self._remember(took)

    def _remember(self, took: FinishedStage) -> None:
        """Add to the record; a command whose work is done does not fail for want of it."""
        try:
            if took.whole:
                remember(self._source, self._work, took.name, took.seconds)
        except RunError as error:
            warn(f"the time of this stage is not kept: {error}")

    @property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Name -> seconds and CPU seconds of each finished stage, in their order."""
        return {took.name: {"seconds": took.seconds, "cpu_seconds": took.cpu_seconds} for took in self._clock.finished}

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Progress]:
        """Report a stage; a line is due every half minute even where it reports no step."""
        line, ended = _Line(name, total, self._clock), threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                line.tick()

        threading.Thread(target=watch, name="stage", daemon=True).start()
        try:
            yield line
        finally:
            ended.set()
        self._remember(self._clock.end())


def _work(pipeline: Pipeline, search: SearchConfig | None = None) -> dict[str, float]:
    handle, config = pipeline.handle, RunConfig(pipeline.source, pipeline.text, pipeline.calibration, search)
    return work_of(config, handle.shapes, handle.width * handle.vocabulary, compression=pipeline.compression)


def estimate_result(estimate: TimeEstimate, pipeline: Pipeline, search: SearchConfig | None = None) -> Result:
    """Return an estimate of timed pieces as a command prints it, after adding it to the machine's record."""
    work = _work(pipeline, search)
    for stage in estimate.stages:
        remember(pipeline.source, work, stage.name, stage.seconds or 0.0)
    return estimate_words(estimate)


def estimate_words(estimate: TimeEstimate) -> Result:
    """Return an estimate as a command prints it."""
    rows = [(stage.name, stage.seconds, stage.words) for stage in estimate.stages]
    lines = [
        f"{name:26} {'unknown' if seconds is None else duration(seconds):>12}   {words}".rstrip()
        for name, seconds, words in (*rows, ("In all", estimate.total, ""))
    ]
    return {"stages": [asdict(stage) for stage in estimate.stages], "seconds": estimate.total, "text": "\n".join(lines)}


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


def reported(statistics: LayerStatistics) -> LayerStatistics:
    """Return ``statistics``; what a user should know of them is reported."""
    warn(*statistics.warnings())
    return statistics

"""Seconds of every stage of a compression before it starts, from timed pieces of the stages themselves.

Notation::

    n, N     windows of a timed piece, and of the run;  b work of the first block's layers, B of all
    a + c·n  seconds of a stage over n windows: two timed pieces tell a and c (``line_through``)

The pieces run on the layers of the first block alone, so that the others cost nothing: a stage that goes block by block takes B / b as
long. Gradients pass through the whole model, whichever layers are measured: their pieces are of all layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig
from lowrank_core.evaluation import evaluate
from lowrank_core.metrics import metric_named
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.handle import ModelHandle
from lowrank_core.runs import home
from lowrank_core.runs.stage_times import KEPT, PieceTimer, StageTime
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.statistics.moments import OutputStatistics
from lowrank_core.statistics.spectra import spectra_of
from lowrank_core.statistics.store import block_path, write_block
from lowrank_core.statistics.weight_spectra import loaded_matrices, weight_spectra
from lowrank_core.text import WindowSet

__all__ = ["TimedPieces"]

_PIECES, _OF_GRADIENTS, _OF_FIT = (2, 6), (1, 3), (2, 32)
"""Windows of the two pieces of a stage. Those of gradients cost most; a fit's decompositions take longer than its first windows."""
_SAMPLE = 8
"""Windows whose statistics are decomposed."""


class TimedPieces:
    """Pieces of the stages of ``pipeline``, each timed when its stage is first asked for."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        compression_ratio: float = 0.0,
        allocator: str = "uniform",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pipeline, self._timer = pipeline, PieceTimer(clock)
        self._ratio, self._allocator = compression_ratio, allocator
        self._loading = self._timer.once(lambda: pipeline.handle)

    @property
    def _handle(self) -> ModelHandle:
        return self._pipeline.handle

    @property
    def _windows(self) -> WindowSet:
        return self._pipeline.calibration_windows

    @cached_property
    def _runner(self) -> BlockRunner:
        return BlockRunner(self._handle)

    @cached_property
    def _trying(self) -> float:
        return self._timer.seconds(lambda: BlockRunner(self._handle))

    @cached_property
    def _part(self) -> ModelHandle:
        """The model with the layers of its first block alone, or all of them where blocks can't be run one by one."""
        first = min(layer.shape.depth for layer in self._handle.layers)
        layers = tuple(layer for layer in self._handle.layers if layer.shape.depth == first)
        return replace(self._handle, layers=layers) if self._runner.chained else self._handle

    @property
    def _blocks(self) -> float:
        """B / b."""
        every, part = (sum(shape.dense_parameters for shape in handle.shapes) for handle in (self._handle, self._part))
        return every / part

    def stage(self, name: str) -> StageTime:
        """Return the seconds of a stage (``runs.stage_times``); None for one of which no piece can be timed.

        Raises:
            LowRankError: bad input, or a numerical failure; as the stage itself.
        """
        text = self._pipeline.text
        pieces: dict[str, Callable[[], float]] = {
            "Loading the model": lambda: self._loading,
            "Reading the text": lambda: self._timer.once(lambda: self._pipeline.windows),
            "Calibrating": self._calibrating,
            "Measuring gradients": self._gradients,
            "Computing weight spectra": lambda: self._blocks * self._weights,
            "Computing spectra": lambda: (
                self._blocks * (self._timer.seconds(partial(spectra_of, self._part, self._moments)) - self._weights)
            ),
            "Factorising": lambda: self._blocks * self._timer.seconds(self._decompose),
            "Measuring the dense model": lambda: self._evaluating(text.validation_windows),
            "Compressing": self._compressing,
            "Writing and measuring": lambda: self._loading + self._evaluating(text.test_windows),
        }
        if name in self._pipeline.kept_stages():
            return StageTime(name, 0.0, KEPT)
        return StageTime(name, pieces[name](), "timed pieces") if name in pieces else StageTime(name, None, "no piece of it can be timed")

    def evaluating(self, name: str, windows: int) -> StageTime:
        """Return the seconds of a stage that evaluates models on so many windows, such as the trials of a search."""
        return StageTime(name, self._evaluating(windows), "timed pieces")

    def _line(self, piece: Callable[[WindowSet], object], counts: tuple[int, int]) -> tuple[float, float]:
        """Return (a, c) of ``piece`` over windows."""
        return self._timer.line(lambda count: piece(self._windows.first(count)), counts, self._windows.windows)

    @cached_property
    def _config(self) -> CalibrationConfig:
        return replace(self._pipeline.calibration, robust="none")  # what leaves groups out needs more of them than a piece has

    def _calibrating(self) -> float:
        part, setup = self._part, self._trying  # before the clock starts
        fixed, each = self._line(lambda windows: collect_statistics(part, windows, self._config), _PIECES)
        inputs = self._moments.inputs
        stored = self._stored(lambda path: write_block(path, inputs, 0.0))
        return setup + self._blocks * (max(0.0, fixed - setup) + each * self._windows.windows + stored)

    def _stored(self, write: Callable[[Path], None]) -> float:
        """Return the seconds in which the statistics of the first block are written."""
        home().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home()) as folder:
            return self._timer.seconds(lambda: write(block_path(Path(folder), "pieces", 0)))

    def _gradients(self) -> float:
        fixed, each = self._line(lambda windows: collect_gradients(self._handle, windows, self._config), _OF_GRADIENTS)
        outputs = self._outputs
        stored = self._stored(lambda path: write_block(path, outputs, 0.0))
        return fixed + each * self._windows.first(self._config.gradient_windows).windows + self._blocks * stored

    def _evaluating(self, windows: int) -> float:
        fixed, each = self._line(partial(evaluate, self._handle), _PIECES)
        return fixed + each * windows

    @cached_property
    def _moments(self) -> LayerStatistics:
        return collect_statistics(self._part, self._windows.first(_SAMPLE), self._config)

    @cached_property
    def _statistics(self) -> LayerStatistics:
        weighed = metric_named(self._pipeline.compression.basis).needs_gradients
        return self._moments.with_outputs(self._outputs) if weighed else self._moments

    @cached_property
    def _outputs(self) -> Mapping[str, OutputStatistics]:
        return collect_gradients(self._part, self._windows.first(_OF_GRADIENTS[0]), self._config)

    @cached_property
    def _weights(self) -> float:
        layers = self._part.layers
        return self._timer.seconds(lambda: list(weight_spectra(loaded_matrices(self._part), total=len(layers))))

    @property
    def _decompose(self) -> Callable[[], Decomposed]:
        return partial(decompose, self._part, self._statistics, self._pipeline.compression)

    def _compressing(self) -> float:
        """Compress the first block; a model that is compressed block by block is tried once before it is."""
        decomposed = self._decompose()
        allocation = decomposed.allocate(self._allocator, self._ratio)
        fixed, each = self._line(partial(decomposed.compress, allocation), _OF_FIT)
        if not decomposed.basis.sequential:
            return fixed
        setup = self._trying
        fitted = self._windows.first(self._pipeline.compression.fit_windows).windows
        reach = 1.0 if self._runner.chained else (1 + self._handle.shapes[-1].depth) / 2  # each pass begins with the tokens
        return setup + self._blocks * (max(0.0, fixed - setup) + each * reach * fitted)

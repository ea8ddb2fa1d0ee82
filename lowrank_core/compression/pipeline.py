"""From a model and a text to smaller models: the one way of the commands, the worker, the benchmarks and a notebook."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import cached_property

from lowrank_core.allocation import RankAllocation, Ranks, allocator_named
from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.error_weights import measure_error_weights
from lowrank_core.compression.memory import check_memory
from lowrank_core.compression.truncations import cost_in_words, measured_perplexities
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, TextConfig
from lowrank_core.decomposition.units import units_of
from lowrank_core.evaluation import DenseReference
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.parameters import Unit
from lowrank_core.presets.recipes import DEFAULT_PRESET, Preset, preset_named
from lowrank_core.runs import statistics_home
from lowrank_core.statistics.calibration import LayerStatistics, cached_statistics, inputs_folder
from lowrank_core.statistics.gradients import cached_gradients, gradients_folder
from lowrank_core.statistics.moments import OutputStatistics
from lowrank_core.statistics.store import is_finished
from lowrank_core.text import TokenWindows, WindowSet, load_text, load_windows
from lowrank_core.types import Stage, silent

__all__ = ["Pipeline"]

_OF_COMPRESSION = ("statistics", "units", "decomposed")
"""Stages that depend on how matrices are compressed; the others are shared."""


class Pipeline:
    """A model, a text, and how to compress: each stage is computed when it is first asked for, and kept.

    ::

        pipeline = Pipeline("demo", "python-stdlib")
        for ratio in (0.2, 0.4):  # calibrated and decomposed once
            print(pipeline.compress(ratio).report.compression_ratio)

    Each stage raises ``LowRankError`` for bad input or a numerical failure, and what ``progress`` raises ends it; then it is not kept.
    """

    def __init__(
        self,
        source: ModelSource | str = "demo",
        text: TextConfig | str = "python-stdlib",
        *,
        calibration: CalibrationConfig | None = None,
        compression: CompressionConfig | Preset | str = DEFAULT_PRESET,
        progress: Stage = silent,
        whole: Collection[str] = (),
    ) -> None:
        """Compute nothing yet.

        Args:
            source: the model, or its reference alone.
            text: the text and its windows, or its reference alone.
            compression: the settings, or a preset or its name, which brings its allocator along.
            progress: is entered for each stage.
            whole: as in ``load_model``.

        Raises:
            ConfigError: a bad reference, or no such preset.
        """
        self.source = ModelSource(source) if isinstance(source, str) else source
        self.text = TextConfig(text) if isinstance(text, str) else text
        self.calibration = calibration or CalibrationConfig()
        self.progress = progress
        self.whole = whole
        self._compress_by(compression)

    def _compress_by(self, compression: CompressionConfig | Preset | str) -> None:
        chosen = preset_named(compression) if isinstance(compression, str) else compression
        self.preset = chosen if isinstance(chosen, Preset) else None
        self.compression = chosen.compression if isinstance(chosen, Preset) else chosen

    def under(self, compression: CompressionConfig | Preset | str) -> Pipeline:
        """Return a pipeline that compresses otherwise, on the same model, windows and moments."""
        if compression == self.compression:
            return self
        _ = self.moments
        result = copy.copy(self)
        result._compress_by(compression)
        if result.compression != self.compression:
            for stage in _OF_COMPRESSION:
                result.__dict__.pop(stage, None)
        return result

    @cached_property
    def handle(self) -> ModelHandle:
        """The dense model."""
        with self.progress("Loading the model", 0):
            return load_model(self.source, whole=self.whole)

    @cached_property
    def windows(self) -> TokenWindows:
        """Calibration, validation and test windows."""
        self.handle.check_context(self.text.context)
        with self.progress("Reading the text", 0):
            return load_text(self.text, self.handle.tokenizer)

    @cached_property
    def calibration_windows(self) -> WindowSet:
        """The calibration windows alone: the other splits of the text may be too short for one."""
        if "windows" in self.__dict__:
            return self.windows.calibration
        return load_windows(self.text, self.handle.tokenizer, "calibration", count=self.text.calibration_windows)

    @cached_property
    def _measured(self) -> tuple[LayerStatistics, bool]:
        windows = self.calibration_windows
        check_memory(self.handle, self.text, self.calibration, self.compression, self.source.memory_bytes)
        with self.progress("Calibrating", windows.windows) as progress:
            return cached_statistics(self.handle, windows, self.calibration, statistics_home(), progress=progress)

    @property
    def moments(self) -> LayerStatistics:
        """The statistics of the inputs alone, measured once and then kept on disk."""
        return self._measured[0]

    @property
    def calibrated_before(self) -> bool:
        """Whether the moments were on disk already."""
        return self._measured[1]

    @cached_property
    def _gradients(self) -> Mapping[str, OutputStatistics]:
        windows = self.calibration_windows
        with self.progress("Measuring gradients", windows.windows) as progress:
            return cached_gradients(self.handle, windows, self.calibration, statistics_home(), progress=progress)

    def kept_stages(self) -> tuple[str, ...]:
        """Return the stages whose statistics are on disk already."""
        places = {"Calibrating": inputs_folder, "Measuring gradients": gradients_folder}
        folders = {
            stage: place(self.handle, self.calibration_windows, self.calibration, statistics_home()) for stage, place in places.items()
        }
        return tuple(stage for stage, folder in folders.items() if is_finished(folder))

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Statistics of the error metric: the moments, and those of the output gradients if it weighs by them."""
        weighed = metric_named(self.compression.basis).needs_gradients
        return self.moments.with_outputs(self._gradients) if weighed else self.moments

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Units: layers that are factored together."""
        return units_of(self.handle, self.compression)

    @cached_property
    def decomposed(self) -> Decomposed:
        """Nested factors of every unit, for any ratio."""
        statistics, by = self.statistics, f" by {self.preset.label}" if self.preset else ""
        with self.progress(f"Factorising{by}", len(self.units)) as progress:
            return decompose(self.handle, statistics, self.compression, store=statistics_home(), progress=progress)

    def allocate(
        self, allocator: str, compression_ratio: float, *, fixed: Ranks | None = None, weights: Mapping[str, float] | None = None
    ) -> RankAllocation:
        """Spend the budget of ``compression_ratio``; what the allocator needs to be measured is measured, and kept on disk.

        Args and errors are those of ``Decomposed.allocate``.
        """
        decomposed, perplexities = self.decomposed, None
        if allocator_named(allocator).needs_perplexities:
            windows = self.calibration_windows
            with self.progress(f"Cutting each matrix alone: {cost_in_words(decomposed, windows)}", 0) as progress:
                perplexities = measured_perplexities(decomposed, windows, statistics_home(), progress=progress)
        return decomposed.allocate(allocator, compression_ratio, fixed=fixed, weights=weights, perplexities=perplexities)

    def dense_reference(self, windows: WindowSet, *, reverse: bool = False, top_k: int = 0) -> DenseReference:
        """Return the dense model's probabilities on ``windows``, for comparisons with it in batches of the calibration's size."""
        size = self.calibration.batch_size
        with self.progress("Measuring the dense model", windows.windows) as progress:
            return DenseReference.compute(self.handle, windows, batch_size=size, reverse=reverse, top_k=top_k, progress=progress)

    def error_weights(
        self, compression_ratio: float, windows: WindowSet, reference: DenseReference, *, fixed: Ranks | None = None
    ) -> dict[str, float]:
        """Return what the error of every unit costs on ``windows``; args and errors are those of ``measure_error_weights``."""
        decomposed, size = self.decomposed, self.calibration.batch_size
        with self.progress("Measuring error weights", len(self.units)) as progress:
            return measure_error_weights(
                decomposed, windows, reference, compression_ratio=compression_ratio, batch_size=size, fixed=fixed, progress=progress
            )

    def compress(self, ranks: float | RankAllocation, *, allocator: str | None = None) -> CompressedModel:
        """Return a smaller model.

        Args:
            ranks: an allocation, or a compression ratio at which ``allocator`` chooses one.
            allocator: the preset's if there is one, else ``uniform``.
        """
        if not isinstance(ranks, RankAllocation):
            ranks = self.allocate(allocator or (self.preset.allocation if self.preset else "uniform"), ranks)
        decomposed = self.decomposed
        with self.progress(f"Compressing by {ranks.label}", 0) as progress:
            return decomposed.compress(ranks, self.calibration_windows, progress=progress)

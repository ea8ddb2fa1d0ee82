"""From a model and a text to smaller models: the one way of the commands, the worker, the benchmarks and a notebook."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from lowrank_core.allocation import DepthBias, RankAllocation, Ranks, allocation_from_ranks, allocator_named
from lowrank_core.allocation.byte_budget import RoundingErrors, allocate_bytes
from lowrank_core.compression.build import CompressedModel, compress
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.error_weights import measure_error_weights
from lowrank_core.compression.lems import cached_scales, measure_depth_bias
from lowrank_core.compression.memory import check_memory
from lowrank_core.compression.quantization import grids_of, quantized
from lowrank_core.compression.rounding_errors import rounding_errors
from lowrank_core.compression.truncations import cost_in_words, measured_perplexities
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, TextConfig
from lowrank_core.decomposition.units import units_of
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation import DenseReference
from lowrank_core.files.grids import GRIDS
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

_OF_COMPRESSION = ("statistics", "units", "decomposed", "_deep_scales", "_rounding")
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
        if result.compression.robust_gradients != self.compression.robust_gradients:
            result.__dict__.pop("_gradients", None)
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
    def validation_windows(self) -> WindowSet:
        """The validation windows alone: what choices are measured on."""
        if "windows" in self.__dict__:
            return self.windows.validation
        return load_windows(self.text, self.handle.tokenizer, "validation", count=self.text.validation_windows)

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
            robust = self.compression.robust_gradients
            return cached_gradients(self.handle, windows, self.calibration, statistics_home(), robust=robust, progress=progress)

    def input_moment(self, layer: str) -> Tensor:
        """Return S = E[x xᵀ] (n, n), float64 and uncentred, of the inputs of a layer of the dense model."""
        group = next(each.input_group for each in self.handle.layers if each.name == layer)
        return self.moments.inputs[group].second_moment

    def kept_stages(self) -> tuple[str, ...]:
        """Return the stages whose statistics are on disk already."""
        given = self.handle, self.calibration_windows, self.calibration, statistics_home()
        folders = {
            "Calibrating": inputs_folder(*given),
            "Measuring gradients": gradients_folder(*given, robust=self.compression.robust_gradients),
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
        """Spend the budget of ``compression_ratio``; what the allocator needs to be measured is measured.

        Perplexities and the scales of ``lems``, measured on validation windows, are kept on disk; what the trials of ``lems`` chose is in
        ``depth_bias`` afterwards.

        Args and errors are those of ``Decomposed.allocate``; ConfigError also where ``weights`` are given to an allocator that measures
        its own.
        """
        decomposed, perplexities, rule = self.decomposed, None, allocator_named(allocator)
        self.depth_bias = None
        if rule.needs_weights:
            if weights is not None:
                raise ConfigError(f"the allocation {rule.name} measures its own error weights. Leave --error-weights out.")
            weights = self._lems_weights(compression_ratio, fixed)
        if rule.needs_perplexities:
            windows = self.calibration_windows
            with self.progress(f"Cutting each matrix alone: {cost_in_words(decomposed, windows)}", 0) as progress:
                perplexities = measured_perplexities(decomposed, windows, statistics_home(), progress=progress)
        return decomposed.allocate(allocator, compression_ratio, fixed=fixed, weights=weights, perplexities=perplexities)

    depth_bias: DepthBias | None = None
    """Choice of the trials of the last allocation by ``lems``."""

    def _lems_weights(self, compression_ratio: float, fixed: Ranks | None) -> Mapping[str, float]:
        decomposed, windows, scales, size = self.decomposed, self.validation_windows, self._deep_scales, self.calibration.batch_size
        reference = self.dense_reference(windows)
        with self.progress("Searching the depth bias", 0) as progress:
            result = measure_depth_bias(
                *(decomposed, windows, reference, scales),
                compression_ratio=compression_ratio,
                batch_size=size,
                fixed=fixed,
                seed=self.text.seed,
                progress=progress,
            )
        self.depth_bias = result.bias
        return result.weights

    @cached_property
    def _deep_scales(self) -> Mapping[str, float]:
        """Costs of the error of every unit on validation windows, at a deep cut."""
        windows, calibration = self.validation_windows, self.calibration_windows

        def measure(known: Mapping[str, float], keep: Callable[[str, float], None]) -> Mapping[str, float]:
            return self._error_weights(0.0, windows, self.dense_reference(windows), deep=True, known=known, keep=keep)

        return cached_scales(self.decomposed, calibration, windows, statistics_home(), measure)

    def dense_reference(self, windows: WindowSet, *, reverse: bool = False, top_k: int = 0) -> DenseReference:
        """Return the dense model's probabilities on ``windows``, for comparisons with it in batches of the calibration's size."""
        size = self.calibration.batch_size
        with self.progress("Measuring the dense model", windows.windows) as progress:
            return DenseReference.compute(self.handle, windows, batch_size=size, reverse=reverse, top_k=top_k, progress=progress)

    def error_weights(
        self, compression_ratio: float, windows: WindowSet, reference: DenseReference, *, deep: bool = False, fixed: Ranks | None = None
    ) -> dict[str, float]:
        """Return what the error of every unit costs on ``windows``; args and errors are those of ``measure_error_weights``."""
        return self._error_weights(compression_ratio, windows, reference, deep=deep, fixed=fixed)

    def _error_weights(self, compression_ratio: float, windows: WindowSet, reference: DenseReference, **about: object) -> dict[str, float]:
        decomposed = self.decomposed
        given = {"compression_ratio": compression_ratio, "batch_size": self.calibration.batch_size, **about}
        with self.progress("Measuring error weights", len(self.units)) as progress:
            return measure_error_weights(decomposed, windows, reference, **given, progress=progress)  # type: ignore[arg-type]

    @property
    def dense_allocation(self) -> RankAllocation:
        """The allocation that leaves every matrix as it is: nothing is decomposed for it."""
        return allocation_from_ranks("dense", self.units, {})

    def quantized(
        self, model: CompressedModel, *, factors: str = "none", dense: str = "none", rounding: str = "nearest"
    ) -> CompressedModel:
        """Return a model of this pipeline on grids: its factors, and its layers that stay dense.

        ::

            pipeline.quantized(pipeline.compress(0), dense="int4", rounding="gptq")

        Args:
            factors, dense: of ``files.grids.GRIDS``, or ``none``; rounding: ``nearest`` or ``gptq``.

        Raises:
            ConfigError: there is nothing to round, or it is rounded already.
            NumericalError: a matrix has no place on its grid; names the layer.
        """
        grids = grids_of(model.handle, factors, dense)
        return quantized(model, grids, moments=self.input_moment if rounding == "gptq" else None)

    def allocate_bytes(self, limit: int, *, dtype: torch.dtype | None = None, rounding: str = "nearest") -> RankAllocation:
        """Spend at most ``limit`` bytes on the compressible layers: a rank, or dense, and a grid for each, by one slope.

        Args:
            dtype: of the floats as they are written; that of the checkpoint unless it is given.
            rounding: ``nearest`` or ``gptq``; ``compress`` takes the same.

        Raises:
            BudgetError: the bytes can't be met.
            NumericalError: a matrix has no place on a grid; names the layer.
        """
        dtype, decomposed = dtype or self.handle.stored_dtype, self.decomposed
        if (dtype, rounding) not in self._rounding:
            moments = self.input_moment if rounding == "gptq" else None
            with self.progress("Measuring errors of rounding", len(self.units)) as progress:
                self._rounding[dtype, rounding] = rounding_errors(decomposed, dtype, moments, progress=progress)
        return allocate_bytes(decomposed.problem(0.0), self._rounding[dtype, rounding], limit, dtype.itemsize)

    @cached_property
    def _rounding(self) -> dict[tuple[torch.dtype, str], RoundingErrors]:
        """Errors of rounding by dtype and rule."""
        return {}

    def compress(
        self, ranks: float | RankAllocation, *, allocator: str | None = None, dtype: torch.dtype | None = None, rounding: str = "nearest"
    ) -> CompressedModel:
        """Return a smaller model.

        Args:
            ranks: an allocation, or a compression ratio at which ``allocator`` chooses one; at 0 all stays dense.
            allocator: the preset's if there is one, else ``uniform``.
            dtype, rounding: of an allocation with grids, as ``allocate_bytes`` takes them.
        """
        if ranks == 0:
            ranks = self.dense_allocation
        if not isinstance(ranks, RankAllocation):
            ranks = self.allocate(allocator or (self.preset.allocation if self.preset else "uniform"), ranks)
        model = self._compressed(ranks)
        if not ranks.grids:
            return model
        grids = {name: GRIDS[grid] for name, grid in ranks.grids.items()}
        return quantized(model, grids, scales=dtype, moments=self.input_moment if rounding == "gptq" else None)

    def _compressed(self, ranks: RankAllocation) -> CompressedModel:
        if not any(ranks.ranks.values()):
            return compress(self.handle, {}, ranks)
        decomposed = self.decomposed
        with self.progress(f"Compressing by {ranks.label}", 0) as progress:
            return decomposed.compress(ranks, self.calibration_windows, progress=progress)

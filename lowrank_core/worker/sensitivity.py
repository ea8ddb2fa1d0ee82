"""Sensitivity measurements of a run: cached state, remaining cells, yielding to urgent work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.compression.sensitivity import evenly_spaced, measured_cell
from lowrank_core.config import CompressionConfig
from lowrank_core.evaluation import DenseReference
from lowrank_core.metrics import metric_named
from lowrank_core.runs import Run
from lowrank_core.search.study import TrialBench
from lowrank_core.sensitivity.config import SensitivityConfig, single_compression
from lowrank_core.sensitivity.planning import planned_cells
from lowrank_core.sensitivity.records import SensitivityCell, SensitivitySetting, append_cell, read_record, record_path
from lowrank_core.statistics.calibration import statistics_key
from lowrank_core.statistics.gradients import gradients_key
from lowrank_core.text import WindowSet
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.session import RunContext, compression_of

__all__ = ["SensitivityBench", "SensitivityOutcome"]


@dataclass(frozen=True)
class SensitivityOutcome:
    """Cells of a measurement.

    Attributes:
        setting: of the cells; file: where they are, in the run's folder.
        cells: those asked for, in the order of measuring; measured: how many of them were measured now.
    """

    setting: SensitivitySetting
    file: str
    cells: tuple[SensitivityCell, ...]
    measured: int


class SensitivityBench:
    """Cached state of a sensitivity measurement: kept while it yields, dropped when done."""

    def __init__(self, run: Run, session: RunContext, reporter: Reporter, search: TrialBench | None = None) -> None:
        self._run, self._session, self._reporter, self._search = run, session, reporter, search
        self._ready: tuple[str, Decomposed, DenseReference] | None = None

    def measure(self, config: SensitivityConfig, go_on: Callable[[], None] = lambda: None) -> SensitivityOutcome:
        """Measure the missing cells of ``config``, each saved at once.

        ``go_on`` is called before each cell; what it raises ends the measurement, and what is written stays.

        Raises:
            ConfigError: no such type or basis.
            LowRankError: a numerical failure in a decomposition, or a damaged record.
            Cancelled: the user asked to stop.
        """
        handle, text = self._session.handle, self._session.windows
        windows = evenly_spaced(text.validation, config.windows)
        compression = single_compression(compression_of(self._run), config)
        setting = self._setting(compression, windows)
        path = record_path(self._run, setting)
        record = read_record(path)
        known = {cell.key: cell for cell in record.cells} if record else {}
        planned = planned_cells(handle.shapes, compression, config)
        missing = [cell for cell in planned if cell.key not in known]
        if missing:
            decomposed, reference = self._prepared(setting, compression, windows)
            with self._reporter.stage("Measuring sensitivity", len(missing)) as progress:
                for done, cell in enumerate(missing, start=1):
                    go_on()
                    known[cell.key] = measured_cell(decomposed, cell, windows, reference, batch_size=self._batch_size)
                    append_cell(path, setting, known[cell.key])
                    progress(done, len(missing))
        self._ready = None
        return SensitivityOutcome(setting, f"sensitivity/{path.name}", tuple(known[cell.key] for cell in planned), len(missing))

    @property
    def _batch_size(self) -> int:
        return self._run.config.calibration.batch_size

    @property
    def _top_k(self) -> int:
        search = self._run.config.search
        return search.top_k if search is not None else 0

    def _setting(self, compression: CompressionConfig, windows: WindowSet) -> SensitivitySetting:
        session, weighed = self._session, metric_named(compression.basis).needs_gradients
        handle, calibration, config = session.handle, session.windows.calibration, session.statistics.config
        return SensitivitySetting(
            basis=compression.basis,
            storage=compression.storage,
            input_damping=compression.input_damping,
            gradient_damping=compression.gradient_damping,
            input_shrinkage=compression.input_shrinkage,
            gradient_shrinkage=compression.gradient_shrinkage,
            windows=windows.windows,
            tokens=windows.predicted_tokens,
            protocol=windows.protocol,
            text=windows.sha256,
            model=handle.fingerprint,
            dtype=handle.dtype,
            statistics=statistics_key(handle, calibration, config),
            gradients=gradients_key(handle, calibration, config, robust=compression.robust_gradients) if weighed else "",
            top_k=self._top_k,
        )

    def _prepared(
        self, setting: SensitivitySetting, compression: CompressionConfig, windows: WindowSet
    ) -> tuple[Decomposed, DenseReference]:
        """Return factors and dense log-probabilities of a setting, cached from an interrupted call."""
        if self._ready is None or self._ready[0] != setting.key:
            self._ready = (setting.key, self._decomposed(compression), self._reference(windows))
        return self._ready[1:]

    def _decomposed(self, compression: CompressionConfig) -> Decomposed:
        """Return the factors of every matrix, reusing those of the search."""
        pipeline = self._session.pipeline.under(compression)
        units = pipeline.units
        held = self._search.decomposed if self._search is not None else None
        if held is not None and single_compression(held.config, SensitivityConfig()) == compression:
            bases = {unit.name: held.bases[unit.name] for unit in units if unit.name in held.bases}
            if all(unit.name in bases and bases[unit.name].unit == unit for unit in units):
                return replace(held, config=compression, units=units, bases=bases)
        return pipeline.decomposed

    def _reference(self, windows: WindowSet) -> DenseReference:
        """Return the log-probabilities of the dense model: their differences have no rounding that all tokens share.

        What trials compare with, Σ p log p + log Σ exp z - p·z, is off by some 1e-7 nats: nothing to a trial, all there is to a module
        that hardly matters.
        """
        top_k = self._top_k
        result = self._session.pipeline.dense_reference(windows, reverse=not top_k, top_k=top_k)
        self._reporter.say(dense_warnings=result.warnings)
        return result

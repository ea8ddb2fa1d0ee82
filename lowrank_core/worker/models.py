"""Lookup of the requested model: a trial, an allocator, a preset, a quantised dense model, or a healed one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_core.allocation import RankAllocation, Ranks, with_current_names
from lowrank_core.allocation.units import check_reachable
from lowrank_core.compression.build import CompressedModel, CompressionReport
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.errors import ConfigError
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.presets.dense import DenseModel, dense_named
from lowrank_core.presets.recipes import Preset, preset_named
from lowrank_core.runs import read_json
from lowrank_core.studies.model_ref import ModelRef
from lowrank_core.studies.naming import model_name
from lowrank_core.worker.context import WorkerContext, chosen_allocation

__all__ = ["BuiltModel", "built_model"]


@dataclass(frozen=True)
class BuiltModel:
    """A compressed model, ready to be measured.

    Attributes:
        label: what its measurements are filed under.
        handle: the model.
        ranks: by unit; empty for a healed one.
        report: what was counted while it was made; None for one that was loaded.
        folder: where it lies on disk; None for one that was built.
        of_search: whether it was made of the factors that the search's trials are made of.
    """

    label: str
    handle: ModelHandle
    ranks: Ranks
    report: CompressionReport | None = None
    folder: Path | None = None
    of_search: bool = False

    @property
    def name(self) -> str:
        """Display name."""
        return model_name(self.label)


def built_model(worker: WorkerContext, ref: ModelRef) -> BuiltModel:
    """Return the model that ``ref`` refers to.

    Requests in a row for the same one share it.

    Raises:
        ConfigError: there is no such trial, preset, grid or folder, or nothing is searched.
        BudgetError: the preset can't meet the run's ratio.
        NumericalError: a decomposition failed; names the layer.
        Cancelled: stopped or withdrawn.
    """
    result = worker.last_built.take(ref, lambda: _built(worker, ref))
    assert isinstance(result, BuiltModel)
    return result


def _built(worker: WorkerContext, ref: ModelRef) -> BuiltModel:
    if ref.kind == "preset":
        return _by_preset(worker, preset_named(ref.name), str(ref))
    if ref.kind == "dense":
        return _quantised(worker, dense_named(ref.name), str(ref))
    if ref.kind == "healed":
        return _healed(worker, ref.name)
    bench, _, _ = worker.search
    allocation = chosen_allocation(worker.run, bench, ref)
    return _compressed(worker, bench.decomposed, allocation, allocation.label)


def _compressed(worker: WorkerContext, decomposed: Decomposed, allocation: RankAllocation, label: str) -> BuiltModel:
    with worker.reporter.stage(f"Compressing by {model_name(label)}") as progress:
        model: CompressedModel = decomposed.compress(allocation, worker.session.windows.calibration, progress=progress)
    bench, _, _ = worker.search
    return BuiltModel(label, model.handle, dict(allocation.ranks), model.report, of_search=decomposed is bench.decomposed)


def _by_preset(worker: WorkerContext, preset: Preset, label: str) -> BuiltModel:
    """Compress with the preset's metric, storage and allocation, on the run's calibration and at its ratio."""
    bench, _, _ = worker.search
    ratio, pipeline = bench.space.compression_ratio, worker.session.pipeline.under(preset)
    check_reachable(pipeline.units, ratio, preset.compression)  # reported before minutes of work
    return _compressed(worker, pipeline.decomposed, pipeline.allocate(preset.allocation, ratio), label)


def _quantised(worker: WorkerContext, wanted: DenseModel, label: str) -> BuiltModel:
    """Return the dense model on a grid; nothing is removed."""
    pipeline = worker.session.pipeline
    with worker.reporter.stage(f"Quantising: {wanted.label}"):
        model = pipeline.quantized(pipeline.compress(0), dense=wanted.grid, rounding=wanted.rounding)
    return BuiltModel(label, model.handle, dict(model.report.ranks), model.report)


def _healed(worker: WorkerContext, name: str) -> BuiltModel:
    folder = worker.run.path / "exports" / Path(name).name
    request = read_json(worker.run.path / "healed" / Path(name).name / "request.json")
    if not name or request is None or not folder.is_dir():
        raise ConfigError(f"this run has no healed model {name!r}. Heal an allocation first.")
    with worker.reporter.stage(f"Loading {model_name(str(request.get('label')))}"):
        handle = load_model(replace(worker.run.config.model, reference=str(folder)))
    return BuiltModel(str(with_current_names(request).get("label")), handle, {}, folder=folder)

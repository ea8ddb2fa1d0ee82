"""The stages before a search, in the order of the architecture's table, for one run."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.analysis import spectra_of
from lowrank_core.bases import basis_named
from lowrank_core.calibration import LayerStatistics, cached_statistics
from lowrank_core.config import SearchConfig
from lowrank_core.decomposition import units_of
from lowrank_core.evaluation import DenseReference
from lowrank_core.gradients import cached_gradients
from lowrank_core.models import ModelHandle, describe, load_model
from lowrank_core.recipe import decompose
from lowrank_core.runs import Run, home, write_json
from lowrank_core.search.reporter import Reporter
from lowrank_core.search.space import SearchSpace
from lowrank_core.search.study import TrialBench
from lowrank_core.spectra import load_spectra, save_spectra
from lowrank_core.text import TokenWindows, load_text
from lowrank_core.units import value_layers

__all__ = ["Session", "prepare", "search_bench"]


@dataclass(frozen=True)
class Session:
    """What a worker keeps warm."""

    handle: ModelHandle
    windows: TokenWindows
    statistics: LayerStatistics


def prepare(run: Run, reporter: Reporter) -> Session:
    """Load model and text, calibrate, compute spectra; each writes its part of the run directory when it is done.

    Raises:
        LowRankError: bad input, or a numerical failure.
        Cancelled: the user asked to stop.
    """
    config = run.config
    with reporter.stage("Loading the model"):
        handle = load_model(config.model)
        write_json(run.path / "model.json", describe(handle))
    with reporter.stage("Reading the text"):
        handle.check_context(config.text.context)
        windows = load_text(config.text, handle.tokenizer)
        write_json(run.path / "text.json", windows.describe(config.text.seed))
    with reporter.stage("Calibrating", windows.calibration.windows) as progress:
        store = home() / "statistics"
        statistics, cached = cached_statistics(handle, windows.calibration, config.calibration, store, progress=progress)
    spectra_path = run.path / "spectra.npz"
    if not spectra_path.exists():
        with reporter.stage("Computing spectra", len(handle.layers)) as progress:
            save_spectra(spectra_path, spectra_of(handle, statistics, progress=progress))
    figures = statistics.describe(load_spectra(spectra_path), handle.layers)
    write_json(run.path / "calibration.json", {**figures, "windows": windows.calibration.windows, "cached": cached})
    reporter.say(warnings=statistics.warnings())
    return Session(handle, windows, statistics)


def search_bench(session: Session, config: SearchConfig, batch_size: int, reporter: Reporter) -> TrialBench:
    """Factorise every layer once and measure the dense model once: all that trials share.

    Raises:
        LowRankError: the ratio can't be met, or a numerical failure.
    """
    handle = session.handle
    compression = config.compression.without_alternatives
    units = units_of(handle, compression)
    dense = value_layers(handle.shapes) if compression.value_dense else ()
    space = SearchSpace(units, config.compression_ratio, dense, config.projected, compression.rank_multiple)
    space.allocation(space.baseline("uniform"))  # an unreachable ratio is told before minutes of work
    statistics = session.statistics
    if basis_named(compression.basis).needs_gradients:
        calibration = session.windows.calibration
        with reporter.stage("Measuring gradients", calibration.windows) as progress:
            store = home() / "statistics"
            statistics = statistics.with_outputs(cached_gradients(handle, calibration, statistics.config, store, progress=progress))
    with reporter.stage("Factorising", len(units)) as progress:
        decomposed = decompose(handle, statistics, compression, progress=progress)
    reporter.say(warnings=(*statistics.warnings(), *decomposed.warnings("")))
    windows = session.windows.validation
    with reporter.stage("Measuring the dense model", windows.windows) as progress:
        reverse = config.objective == "bolaco"
        reference = DenseReference.compute(handle, windows, batch_size=batch_size, reverse=reverse, progress=progress)
    return TrialBench(decomposed, windows, reference, space, batch_size)

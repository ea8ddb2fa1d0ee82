"""The stages before a search, in the order of the architecture's table, for one run."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.analysis import spectra_of
from lowrank_core.bases import factorize, priced_shapes
from lowrank_core.calibration import LayerStatistics, cached_statistics
from lowrank_core.config import SearchConfig
from lowrank_core.evaluation import DenseReference
from lowrank_core.models import ModelHandle, describe, load_model
from lowrank_core.runs import Run, home, write_json
from lowrank_core.search.reporter import Reporter
from lowrank_core.search.space import SearchSpace, value_layers
from lowrank_core.search.study import TrialBench
from lowrank_core.spectra import load_spectra, save_spectra
from lowrank_core.text import TokenWindows, load_text

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
    handle, compression = session.handle, config.compression
    shapes = priced_shapes(handle, compression.basis)
    space = SearchSpace(shapes, config.compression_ratio, value_layers(shapes) if compression.value_dense else ())
    space.allocation(space.baseline("uniform"))  # an unreachable ratio is told before minutes of work
    with reporter.stage("Factorising", len(handle.layers)) as progress:
        bases = factorize(handle, session.statistics, compression.basis, progress=progress)
    windows = session.windows.validation
    with reporter.stage("Measuring the dense model", windows.windows) as progress:
        dense = DenseReference.compute(handle, windows, batch_size=batch_size, progress=progress)
    return TrialBench(handle, bases, windows, dense, space, batch_size)

"""Stages before a search, in order."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass

from lowrank_core.allocation import unspent_warning
from lowrank_core.allocation.curves import CURVES_FILE, CurveRecord, save_curves
from lowrank_core.allocation.units import check_reachable, dense_layers
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.export import biases_without_place
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle, describe
from lowrank_core.models.attention import Heads, find_heads
from lowrank_core.models.modules import Modules, find_modules
from lowrank_core.runs import Run, write_json
from lowrank_core.search.selection import Selection, select_windows
from lowrank_core.search.study import TrialBench
from lowrank_core.spectra.spectrum import SPECTRA_FILE, WEIGHTS_FILE, load_spectra, save_spectra
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.statistics.spectra import spectra_of
from lowrank_core.statistics.weight_spectra import loaded_matrices, weight_spectra
from lowrank_core.studies.published import ALLOCATIONS, POOL_RATIO
from lowrank_core.studies.space import WEIGHTED, SearchSpace
from lowrank_core.text import TokenWindows, WindowSet, load_windows, overlap_warnings
from lowrank_core.worker.identity import JOIN, RESUME, RunIdentity, identity_of_factors, identity_of_model, identity_of_texts
from lowrank_core.worker.reporter import Reporter

__all__ = ["RunContext", "compression_of", "fingerprint", "prepare", "record_curves", "search_bench"]


@dataclass(frozen=True)
class RunContext:
    """Loaded state of a run."""

    pipeline: Pipeline
    notes: tuple[str, ...] = ()
    """Warnings on model and text: what can't be compressed, and which splits repeat each other."""

    @property
    def handle(self) -> ModelHandle:
        return self.pipeline.handle

    @property
    def windows(self) -> TokenWindows:
        return self.pipeline.windows

    @property
    def statistics(self) -> LayerStatistics:
        """Of the inputs alone."""
        return self.pipeline.moments


def prepare(run: Run, reporter: Reporter, *, leads: bool = True) -> RunContext:
    """Load model and text, calibrate, compute spectra; for who ``leads``, each writes its part of the run directory when it is done.

    Raises:
        ConfigError: the model or the text is not what the run was begun with; says which, before anything is computed.
        LowRankError: bad input, or a numerical failure.
        Cancelled: the user asked to stop.
    """
    config = run.config
    identity = RunIdentity.of(run, RESUME if leads else JOIN)
    meet = identity.keep if leads else identity.check
    pipeline = Pipeline(
        config.model,
        config.text,
        calibration=config.calibration,
        compression=compression_of(run),
        progress=reporter.stage,
        whole=run.layers,
    )
    handle = pipeline.handle
    meet(identity_of_model(handle))
    heads = find_heads(handle)
    modules = find_modules(handle, heads)
    notes = _notes(run, handle, heads, modules)
    reporter.say(warnings=notes)  # before work is spent
    windows = pipeline.windows
    meet(identity_of_texts(handle, config.calibration, windows.calibration, windows.validation, windows.test))
    reporter.plan(handle.shapes, handle.width * handle.vocabulary, pipeline.kept_stages())
    repeats = overlap_warnings(windows.calibration, windows.validation, windows.test)
    notes = (*notes, *_told(repeats))
    if leads:
        places = {"biases_without_place": _biases_without_place(run, handle)}
        write_json(run.path / "model.json", {**describe(handle), **heads.describe(), **modules.describe(), **places})
        write_json(run.path / "text.json", {**windows.describe(config.text.seed), "warnings": list(repeats)})
        _weights(run, handle, reporter)
    statistics = pipeline.moments
    session = RunContext(pipeline, notes)
    if leads:
        _describe(run, session, reporter)
    reporter.say(warnings=(*notes, *statistics.warnings()))
    return session


def compression_of(run: Run) -> CompressionConfig:
    """Return the search's way to compress, or the default where nothing is searched."""
    return run.config.search.compression if run.config.search is not None else CompressionConfig()


def _notes(run: Run, handle: ModelHandle, heads: Heads, modules: Modules) -> tuple[str, ...]:
    search, compression = run.config.search, compression_of(run)
    warning = handle.coverage.warning(None if search is None else search.compression_ratio)
    by_heads = [str(entry) for entry in heads.dropped if compression.heads or compression.modules]
    return _told((*filter(None, [warning]), *by_heads, *(modules.dropped if compression.modules else ())))


def _biases_without_place(run: Run, handle: ModelHandle) -> int:
    """Return to how many layers the metric of the search may give a bias that a dense merge can't hold."""
    return len(biases_without_place(handle)) if metric_named(compression_of(run).basis).centred and run.config.search is not None else 0


def _told(notes: tuple[str, ...]) -> tuple[str, ...]:
    """Print ``notes``, and return them."""
    for note in notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    return notes


def _weights(run: Run, handle: ModelHandle, reporter: Reporter) -> None:
    """Write the spectra of the weights block by block, until those of the calibration take their place."""
    path, total = run.path / WEIGHTS_FILE, len(handle.layers)
    if (run.path / SPECTRA_FILE).exists():
        return
    known = load_spectra(path) if path.exists() else ()
    if len(known) < total:
        with reporter.stage("Computing weight spectra", total) as progress:
            matrices = loaded_matrices(handle, without=[spectrum.shape.name for spectrum in known])
            for spectra in weight_spectra(matrices, total=total, known=known, progress=progress):
                save_spectra(path, spectra)


def _describe(run: Run, session: RunContext, reporter: Reporter) -> None:
    """Write spectra and the summary of the calibration."""
    path, handle = run.path / SPECTRA_FILE, session.handle
    if not path.exists():
        with reporter.stage("Computing spectra", len(handle.layers)) as progress:
            known = load_spectra(run.path / WEIGHTS_FILE)
            save_spectra(path, spectra_of(handle, session.statistics, known=known, progress=progress))
    (run.path / WEIGHTS_FILE).unlink(missing_ok=True)
    figures = session.statistics.describe(load_spectra(path), handle.layers)
    windows, cached = session.windows.calibration.windows, session.pipeline.calibrated_before
    write_json(run.path / "calibration.json", {**figures, "windows": windows, "cached": cached})


def search_bench(session: RunContext, config: SearchConfig, reporter: Reporter, *, selection: Selection | None = None) -> TrialBench:
    """Factorise every layer and evaluate the dense model, once for all trials.

    ``selection`` is that of an earlier worker: windows are not selected again.

    Raises:
        LowRankError: the ratio can't be met, or a numerical failure.
    """
    pipeline = session.pipeline.under(config.compression)
    units, compression = pipeline.units, config.compression
    dense = dense_layers(units, compression)
    plain = SearchSpace.of(
        units, config, dense, None
    )  # what can't be searched, like an unreachable ratio, is reported before minutes of work
    for ratio in filter(None, (config.compression_ratio, config.max_ratio)):
        check_reachable(units, ratio, compression)
    statistics, decomposed = pipeline.statistics, pipeline.decomposed
    allocator = WEIGHTED.name if config.variables == "error_weight" else ""
    reported = (*session.notes, *statistics.warnings(), *decomposed.warnings(allocator, weighted=config.error_weights))
    reporter.say(warnings=reported)
    windows = session.windows.validation
    if config.selected_windows:
        windows, selection = _selected(session, decomposed, plain, config, reporter, selection)
        reported = (*reported, *filter(None, [selection.warning()]))
        reporter.say(warnings=reported)
    reference = pipeline.dense_reference(windows, reverse=config.objective == "bolaco", top_k=config.top_k)
    reporter.say(dense_warnings=reference.warnings)
    curves = decomposed.curves
    if config.error_weights:
        error_weights = pipeline.error_weights(config.compression_ratio, windows, reference, deep=config.deep_weights)
        curves = {name: curve * error_weights.get(name, 1.0) for name, curve in curves.items()}
    space = SearchSpace.of(units, config, dense, curves)
    reporter.say(warnings=(*reported, *_unspent(space)))
    size = pipeline.calibration.batch_size
    return TrialBench(decomposed, windows, reference, space, size, selection if config.selected_windows else None)


def _selected(
    session: RunContext,
    decomposed: Decomposed,
    space: SearchSpace,
    config: SearchConfig,
    reporter: Reporter,
    known: Selection | None,
) -> tuple[WindowSet, Selection]:
    """Return the windows of trials of a published search, and how they were selected."""
    size = session.pipeline.calibration.batch_size
    pool = load_windows(session.pipeline.text, session.handle.tokenizer, "validation", count=round(POOL_RATIO * config.selected_windows))
    with reporter.stage(f"Selecting {config.selected_windows} of {pool.windows} validation windows", ALLOCATIONS) as progress:
        result = select_windows(decomposed, pool, space, config, batch_size=size, known=known, progress=progress)
    return result.of(pool), result


def _unspent(space: SearchSpace) -> tuple[str, ...]:
    """Return a note on the budget lost to rounding, at uniform ranks; a search loses about as much."""
    if space.rank_multiple == 1:
        return ()
    uniform = space.by_allocator("uniform", space.compression_ratio)
    result = unspent_warning(space.units, space.compression_ratio, uniform, space.rank_multiple)
    return tuple(f"With uniform ranks, {words}" for words in result)


def record_curves(run: Run, config: SearchConfig, bench: TrialBench) -> str:
    """Write the allocators' error curves to ``run``, and return their meaning (``curves.ESTIMATES``).

    Raises:
        OSError: the disk is full or read-only.
    """
    decomposed, space = bench.decomposed, bench.space
    estimate = "error_weights" if config.error_weights else "kl" if decomposed.basis.comparable else "own"
    record = CurveRecord(config.compression.basis, estimate, space.curves or {}, tuple(decomposed.statistics.influence))
    save_curves(run.path / CURVES_FILE, record, space.units)
    return estimate


def fingerprint(session: RunContext, bench: TrialBench) -> dict[str, object]:
    """Return what workers of one study must share: hashes, and the energy of the metric."""
    handle, windows = session.handle, session.windows
    text = hashlib.sha256((windows.calibration.sha256 + bench.windows.sha256).encode()).hexdigest()[:32]
    texts = identity_of_texts(handle, session.statistics.config, windows.calibration, windows.validation, windows.test)
    return {**identity_of_model(handle), **texts, "text": text, **identity_of_factors(bench.decomposed)}

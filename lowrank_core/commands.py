"""What each command of ``lowrank`` does: stages in a row, and a result as a mapping with a ``text`` for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from lowrank_core.accounting import Unit
from lowrank_core.allocation import RankAllocation, Ranks, allocation_from_ranks, allocator_named, read_allocation, read_ranks
from lowrank_core.analysis import spectra_of
from lowrank_core.bases import basis_named
from lowrank_core.benchmarks import allocation as allocation_benchmark
from lowrank_core.benchmarks import quality as quality_benchmark
from lowrank_core.benchmarks import search as search_benchmark
from lowrank_core.benchmarks import speed as speed_benchmark
from lowrank_core.calibration import LayerStatistics, cached_statistics
from lowrank_core.config import (
    CalibrationConfig,
    CompressionConfig,
    CompressRequest,
    ModelSource,
    TextConfig,
    check_ratio,
    to_mapping,
)
from lowrank_core.decomposition import units_of
from lowrank_core.directions.config import DirectionsConfig
from lowrank_core.directions.measuring import top_directions
from lowrank_core.errors import BudgetError, TextError
from lowrank_core.evaluation import DenseReference
from lowrank_core.export import HeldOut, check_free, export, held_out
from lowrank_core.export.manifest import report_of
from lowrank_core.models import ModelHandle, describe, load_model, max_context
from lowrank_core.recipe import Decomposed, decompose, with_gradients
from lowrank_core.runs import statistics_home
from lowrank_core.slopes import measured_slopes
from lowrank_core.spectra import LayerSpectrum, effective_rank, participation_ratio, rank_for_energy, stable_rank
from lowrank_core.text import WindowSet, load_text, load_windows
from lowrank_core.tuning import TuningPoint, tune
from lowrank_core.units import check_reachable

__all__ = [
    "analyze",
    "benchmark_allocation",
    "benchmark_quality",
    "benchmark_search",
    "benchmark_speed",
    "compress_to",
    "calibrated",
    "fitting_context",
    "progress_line",
]

Result = dict[str, object]


def progress_line(label: str) -> Callable[[int, int], None]:
    """Return a callback that keeps one line on a terminal, and is silent elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{label} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


def fitting_context(source: ModelSource) -> int:
    """Return the default context, or what the model takes if that is less."""
    return min(TextConfig().context, max_context(source.reference) or TextConfig().context)


def calibrated(handle: ModelHandle, windows: WindowSet, config: CalibrationConfig, *, basis: str | None = None) -> LayerStatistics:
    """Return the statistics of ``windows``, with what ``basis`` needs; what a user should know of them is told."""
    statistics, _ = cached_statistics(handle, windows, config, statistics_home(), progress=progress_line("Calibrating"))
    if basis is not None:
        gradients = nullcontext(progress_line("Measuring gradients"))
        statistics = with_gradients(handle, statistics, windows, (basis,), measuring=gradients)
    for warning in statistics.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return statistics


def _spectrum_row(spectrum: LayerSpectrum) -> Result:
    shape, weight, feature = spectrum.shape, spectrum.weight_energy, spectrum.feature_eigenvalues
    return {
        "name": shape.name,
        "kind": shape.kind,
        "depth": shape.depth,
        "d_out": shape.d_out,
        "d_in": shape.d_in,
        "break_even_rank": shape.break_even_rank,
        "weight_effective_rank": effective_rank(weight),
        "feature_effective_rank": effective_rank(feature),
        "weight_stable_rank": stable_rank(weight),
        "feature_stable_rank": stable_rank(feature),
        "feature_participation_ratio": participation_ratio(feature),
        "feature_rank_for_90_percent": rank_for_energy(feature, 0.90),
        "feature_rank_for_99_percent": rank_for_energy(feature, 0.99),
        "weight_rank_for_90_percent": rank_for_energy(weight, 0.90),
        "weight_rank_for_99_percent": rank_for_energy(weight, 0.99),
    }


def analyze(source: ModelSource, text: TextConfig, calibration: CalibrationConfig, *, directions: tuple[str, str] | None = None) -> Result:
    """Calibrate, and return the figures of every compressible layer; with ``directions`` (module, side) what its top ones mean, too."""
    config = DirectionsConfig(*directions, batch_size=calibration.batch_size) if directions else None
    handle = load_model(source)
    windows = load_windows(text, handle.tokenizer, "calibration", count=text.calibration_windows)
    statistics = calibrated(handle, windows, calibration)
    spectra = spectra_of(handle, statistics, progress=progress_line("Spectra"))
    rows = [_spectrum_row(spectrum) for spectrum in spectra]
    lines = [f"{'layer':42} {'shape':>12} {'break-even':>10} {'eff. rank W':>12} {'eff. rank y':>12} {'90 % of y':>10} {'99 % of y':>10}"]
    for spectrum, row in zip(spectra, rows, strict=True):
        lines.append(
            f"{spectrum.shape.name:42} {f'{spectrum.shape.d_out} x {spectrum.shape.d_in}':>12} {row['break_even_rank']:>10} "
            f"{row['weight_effective_rank']:>12.1f} {row['feature_effective_rank']:>12.1f} "
            f"{row['feature_rank_for_90_percent']:>10} {row['feature_rank_for_99_percent']:>10}"
        )
    summary = describe(handle)
    del summary["layers"]
    figures = statistics.describe(spectra, handle.layers)
    result: Result = {"model": summary, "layers": rows, "calibration": figures, "warnings": list(statistics.warnings())}
    if config is not None:
        found = top_directions(handle, windows, statistics, config)
        result["directions"] = found.to_mapping()
        lines += ["", found.to_text()]
    return {**result, "text": "\n".join(lines)}


def _manual(request: CompressRequest, units: Sequence[Unit]) -> RankAllocation | None:
    """Return the allocation of a file of ranks, if one was given that is not to be completed."""
    ratio = request.compression_ratio
    if request.ranks is None or request.complete is not None:
        return None
    found = allocation_from_ranks("manual", units, read_ranks(request.ranks))
    if ratio is not None and found.compression_ratio < ratio:
        raise BudgetError(
            f"the ranks of {request.ranks} remove {found.compression_ratio:.4f} of the parameters, "
            f"less than the ratio {ratio:g} asked for. "
            "Lower some ranks, or leave --compression-ratio out."
        )
    return found


def _tuned(
    handle: ModelHandle, statistics: LayerStatistics, request: CompressRequest, text: TextConfig
) -> tuple[CompressionConfig, tuple[TuningPoint, ...]]:
    assert request.compression_ratio is not None
    config, points = tune(
        handle,
        statistics,
        request.compression,
        load_text(text, handle.tokenizer),
        allocator=request.allocation,
        compression_ratio=request.compression_ratio,
        progress=progress_line("Tuning"),
    )
    for point in points:
        kl = "diverged" if point.kl is None else f"KL {point.kl:.6f} on validation text"
        print(f"gradient damping {point.gradient_damping:g}, beta {point.drift_beta:g}: {kl}", file=sys.stderr)
    return config, points


def _slopes(decomposed: Decomposed, text: TextConfig, request: CompressRequest, fixed: Ranks) -> dict[str, float]:
    """Measure what the error of every unit costs, on validation text."""
    assert request.compression_ratio is not None
    handle = decomposed.handle
    windows = load_windows(text, handle.tokenizer, "validation", count=text.validation_windows)
    dense = DenseReference.compute(handle, windows, batch_size=request.calibration.batch_size)
    return measured_slopes(
        decomposed,
        windows,
        dense,
        compression_ratio=request.compression_ratio,
        batch_size=request.calibration.batch_size,
        fixed=fixed,
        progress=progress_line("Measuring slopes"),
    )


def _test_text(handle: ModelHandle, text: TextConfig) -> tuple[HeldOut | None, tuple[str, ...]]:
    """Return what the written folder is measured on; without it, why not."""
    try:
        return held_out(handle, text), ()
    except TextError as error:
        return None, (f"what is written is not measured: {error}",)


def compress_to(source: ModelSource, text: TextConfig, request: CompressRequest) -> Result:
    """Calibrate, factorise, allocate, compress and write."""
    began = time.perf_counter()
    check_free(request.out)
    basis_named(request.compression.basis)  # bad names, like a bad file, are told before anything is loaded
    allocator_named(request.allocation)
    fixed = read_allocation(request.ranks).fixed if request.ranks is not None and request.complete is not None else {}
    if request.complete is not None:
        allocator_named(request.complete)
    if request.ranks is not None:
        read_ranks(request.ranks)
    handle = load_model(source)
    units = units_of(handle, request.compression)
    allocation = _manual(request, units)  # bad ranks are told before minutes of calibration
    if request.compression_ratio is not None:
        check_reachable(units, request.compression_ratio, request.compression)
    windows = load_windows(text, handle.tokenizer, "calibration", count=text.calibration_windows)
    test, lacks = _test_text(handle, text)
    statistics = calibrated(handle, windows, request.calibration, basis=request.compression.basis)
    compression, tuning = _tuned(handle, statistics, request, text) if request.tune else (request.compression, ())
    decomposed = decompose(handle, statistics, compression, progress=progress_line("Factorising"))
    if allocation is None:
        assert request.compression_ratio is not None
        weights = _slopes(decomposed, text, request, fixed) if request.slopes else None
        allocation = decomposed.allocate(request.complete or request.allocation, request.compression_ratio, fixed=fixed, weights=weights)
    doubts = (*decomposed.warnings(allocation.allocator, weighted=request.slopes), *lacks)
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    model = decomposed.compress(allocation, windows, progress=progress_line("Fitting block by block"))
    provenance = {
        "preset": request.preset,
        "allocation": allocation.allocator,
        "text": text.reference,
        "seed": text.seed,
        "slopes": request.slopes,
        **to_mapping(compression),
        "tuning": [to_mapping(point) for point in tuning],
        "command": request.command,
    }
    written = export(model, request.out, provenance=provenance, config=request.export, test=test)
    report = report_of(written)  # of what was written: int8 factors have scales
    result = {
        "out": str(request.out),
        "preset": request.preset,
        "tuning": provenance["tuning"],
        "gradient_damping": compression.gradient_damping,
        "drift_beta": compression.drift_beta,
        "basis": request.compression.basis,
        "storage": request.compression.storage,
        "allocation": allocation.allocator,
        "compression_ratio": report.compression_ratio,
        "model_compression_ratio": report.model_compression_ratio,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "compressible_parameters_before": report.linear_parameters_before,
        "compressible_parameters_after": report.linear_parameters_after,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "quantization": report.quantization,
        "ranks": dict(report.ranks),
        "linear_flops_before": report.linear_flops_before,
        "linear_flops_after": report.linear_flops_after,
        "perplexity": None if written.measured is None else written.measured.perplexity,
        "warnings": [*statistics.warnings(), *doubts],
        "seconds": time.perf_counter() - began,
    }
    result["text"] = (
        f"Wrote {request.out}: {report.compression_ratio:.1%} of the compressible linears' parameters removed "
        f"({report.linear_parameters_before:,} to {report.linear_parameters_after:,}), "
        f"{report.model_compression_ratio:.1%} of the whole model."
    )
    return result


def benchmark_allocation(source: ModelSource, text: TextConfig, ratios: Sequence[float], *, seeds: int, trials: int) -> Result:
    """Measure uniform, lord_manual and the search's best on test text."""
    rows = allocation_benchmark.allocation_table(source, text, ratios, seeds=seeds, trials=trials)
    return {"rows": [row.to_mapping() for row in rows], "text": allocation_benchmark.as_markdown(rows)}


def benchmark_quality(
    source: ModelSource, text: TextConfig, ratios: Sequence[float], *, variants: bool, search: bool, int8: bool = False
) -> Result:
    """Measure every preset at equal parameters on test text."""
    for ratio in ratios:
        check_ratio(ratio)
    rows = quality_benchmark.quality_table(source, text, ratios, variants=variants, search=search, int8=int8)
    return {"model": source.reference, "rows": [row.to_mapping() for row in rows], "text": quality_benchmark.as_markdown(rows)}


def benchmark_search(
    source: ModelSource, text: TextConfig, ratios: Sequence[float], *, seeds: int, trials: int, schemes: Sequence[str] | None = None
) -> Result:
    """Run searches side by side, and measure what a cheaper trial changes."""
    for ratio in ratios:
        check_ratio(ratio)
    chosen = schemes or search_benchmark.SCHEMES
    curves = search_benchmark.search_curves(source, text, ratios, seeds=seeds, trials=trials, schemes=chosen)
    cheaper = search_benchmark.cheaper_trials(source, text, ratios)
    windows = load_windows(text, load_model(source).tokenizer, "validation", count=text.validation_windows)
    protocol = f"KL to the dense model, nats per token, seeds 0 to {seeds - 1}; {windows.protocol}."
    return {
        "model": source.reference,
        "curves": [curve.to_mapping() for curve in curves],
        "cheaper": [row.to_mapping() for row in cheaper],
        "protocol": protocol,
        "text": search_benchmark.as_markdown(curves, cheaper, protocol),
    }


def benchmark_speed(source: ModelSource, text: TextConfig) -> Result:
    """Compare calibration, a trial and the layers with forward passes and dense layers."""
    rows = speed_benchmark.speed_table(source, text)
    return {"model": source.reference, "rows": [row.to_mapping() for row in rows], "text": speed_benchmark.as_markdown(rows)}

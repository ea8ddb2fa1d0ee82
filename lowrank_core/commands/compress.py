"""``lowrank compress``: calibrate, factorise, allocate, compress and write."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from lowrank_core.allocation import (
    RankAllocation,
    allocation_from_ranks,
    allocator_named,
    read_allocation,
    read_ranks,
    unspent_parameters,
    unspent_warning,
)
from lowrank_core.allocation.units import check_reachable
from lowrank_core.commands.shared import Stages, coverage_warnings, estimate_result, reported, warn
from lowrank_core.compression.estimate import TimedPieces
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.compression.truncations import cost_in_words
from lowrank_core.compression.tuning import TuningPoint, tune
from lowrank_core.config import CompressionConfig, CompressRequest, ModelSource, TextConfig, to_mapping
from lowrank_core.errors import BudgetError, TextError
from lowrank_core.export import HeldOut, check_form, check_free, check_precision, export, held_out
from lowrank_core.export.card import written_words
from lowrank_core.export.manifest import report_of
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle, notes_of
from lowrank_core.parameters import Unit
from lowrank_core.runs.stage_times import TimeEstimate, stages_of_compression
from lowrank_core.text import load_text, load_windows, overlap_warnings
from lowrank_core.types import Result
from lowrank_core.wording import duration

__all__ = ["compress_to", "estimate"]

_COUNTS = (
    *("compression_ratio", "model_compression_ratio", "parameters_before", "parameters_after", "bytes_before", "bytes_after"),
    *("quantization", "linear_flops_before", "linear_flops_after", "model_flops_before", "model_flops_after"),
)
"""Of the report on what was written, those that are printed under their own names."""

_USUAL_RATIO = 0.2
"""At which pieces are timed where a file of ranks says what is removed."""


def compress_to(source: ModelSource, text: TextConfig, request: CompressRequest) -> Result:
    """Calibrate, factorise, allocate, compress and write."""
    began = time.perf_counter()
    check_free(request.out)
    metric_named(request.compression.basis)  # bad names, like a bad file, are reported before anything is loaded
    allocator_named(request.allocation)
    fixed = read_allocation(request.ranks).fixed if request.ranks is not None and request.complete is not None else {}
    if request.complete is not None:
        allocator_named(request.complete)
    named = {layer for unit in (read_ranks(request.ranks) if request.ranks is not None else ()) for layer in unit.split("+")}
    stages = Stages()
    pipeline = Pipeline(source, text, calibration=request.calibration, compression=request.compression, progress=stages.stage, whole=named)
    handle, units = pipeline.handle, pipeline.units
    allocation = _manual(request, units)  # bad ranks are reported before minutes of calibration
    if request.compression_ratio is not None:
        check_reachable(units, request.compression_ratio, request.compression)
    narrow = coverage_warnings(handle, request.compression_ratio)
    _ = pipeline.calibration_windows  # a text that can't be read is reported as such
    stages.plan(pipeline, _stages(request))
    test, lacks = _test_text(handle, text)
    repeats = () if test is None else overlap_warnings(pipeline.calibration_windows, test.windows)
    check_form(handle, metric_named(request.compression.basis), request.export)
    check_precision(handle, request.export, None if test is None else test.windows)
    statistics = reported(pipeline.statistics)
    compression, tuning = _tuned(pipeline, request, stages) if request.tune else (request.compression, ())
    pipeline = pipeline.under(compression)
    decomposed = pipeline.decomposed
    if allocation is None:
        assert request.compression_ratio is not None
        weights = None
        if request.error_weights:
            validation = load_windows(text, handle.tokenizer, "validation", count=text.validation_windows)
            weights = pipeline.error_weights(request.compression_ratio, validation, pipeline.dense_reference(validation), fixed=fixed)
        rule = request.complete or request.allocation
        if allocator_named(rule).needs_perplexities:
            cost = cost_in_words(decomposed, pipeline.calibration_windows)
            print(f"{rule}: {cost} of calibration text, kept for the next ratio", file=sys.stderr)
        allocation = pipeline.allocate(rule, request.compression_ratio, fixed=fixed, weights=weights)
    unspent = None if request.compression_ratio is None else unspent_parameters(units, request.compression_ratio, allocation)
    lost = _unspent(request, units, allocation)
    doubts = warn(*decomposed.warnings(allocation.allocator, weighted=request.error_weights), *lost, *lacks, *repeats)
    model = pipeline.compress(allocation)
    provenance = {
        "preset": request.preset,
        "allocation": allocation.label,
        "text": text.reference,
        "seed": text.seed,
        "error_weights": request.error_weights,
        **to_mapping(compression),
        "tuning": [to_mapping(point) for point in tuning],
        "warnings": list(doubts),
        "command": request.command,
    }
    with stages.stage("Writing and measuring") as progress:
        written = export(model, request.out, provenance=provenance, config=request.export, test=test, progress=progress)
    report = report_of(written)  # of what was written: int8 factors have scales
    result = {
        "out": str(request.out),
        "preset": request.preset,
        "tuning": provenance["tuning"],
        "gradient_damping": compression.gradient_damping,
        "drift_beta": compression.drift_beta,
        "basis": request.compression.basis,
        "storage": request.compression.storage,
        "allocation": allocation.label,
        **{name: getattr(report, name) for name in _COUNTS},
        "unspent_parameters": unspent,
        "compressible_parameters_before": report.linear_parameters_before,
        "compressible_parameters_after": report.linear_parameters_after,
        "ranks": dict(report.ranks),
        "written_parameters": written.written_parameters,
        "written_bytes": written.written_bytes,
        "perplexity": None if written.measured is None else written.measured.perplexity,
        "coverage": report.dense_coverage.to_mapping(),
        "warnings": [*notes_of(source.reference), *narrow, *statistics.warnings(), *doubts],
        "stages": stages.seconds,
        "seconds": time.perf_counter() - began,
    }
    took = ", ".join(f"{name} {duration(of['seconds'])}" for name, of in stages.seconds.items())
    result["text"] = f"Wrote {request.out}: {written_words(written)}\nTime: {took}; {duration(time.perf_counter() - began)} in all."
    return result


def _stages(request: CompressRequest) -> tuple[str, ...]:
    rule = request.complete or (None if request.ranks is not None else request.allocation)
    cut = rule is not None and allocator_named(rule).needs_perplexities
    return stages_of_compression(request.compression, tune=request.tune, weights=request.error_weights, cut=cut)


def estimate(source: ModelSource, text: TextConfig, request: CompressRequest) -> Result:
    """Time pieces of every stage of ``compress_to``; nothing is compressed, and nothing written but the machine's record.

    Raises:
        LowRankError: as ``compress_to``, as far as the pieces reach.
    """
    pipeline = Pipeline(source, text, calibration=request.calibration, compression=request.compression)
    needs_perplexities = allocator_named(request.allocation).needs_perplexities
    rule = "uniform" if needs_perplexities else request.allocation
    pieces = TimedPieces(pipeline, compression_ratio=request.compression_ratio or _USUAL_RATIO, allocator=rule)
    result = TimeEstimate(tuple(map(pieces.stage, _stages(request))))
    return estimate_result(result, pipeline)


def _manual(request: CompressRequest, units: Sequence[Unit]) -> RankAllocation | None:
    """Return the allocation of a file of ranks, if one was given that is not to be completed."""
    ratio = request.compression_ratio
    if request.ranks is None or request.complete is not None:
        return None
    result = allocation_from_ranks("manual", units, read_ranks(request.ranks))
    if ratio is not None and result.compression_ratio < ratio:
        raise BudgetError(
            f"the ranks of {request.ranks} remove {result.compression_ratio:.4f} of the parameters, "
            f"less than the ratio {ratio:g} asked for. "
            "Lower some ranks, or leave --compression-ratio out."
        )
    return result


def _unspent(request: CompressRequest, units: Sequence[Unit], allocation: RankAllocation) -> tuple[str, ...]:
    """Return what to say of what rounding left of the budget; nothing of ranks that the user chose."""
    if request.compression_ratio is None or not allocation.allocator:
        return ()
    return unspent_warning(units, request.compression_ratio, allocation, request.compression.rank_multiple)


def _tuned(pipeline: Pipeline, request: CompressRequest, stages: Stages) -> tuple[CompressionConfig, tuple[TuningPoint, ...]]:
    assert request.compression_ratio is not None
    with stages.stage("Tuning") as progress:
        config, points = tune(
            pipeline.handle,
            pipeline.statistics,
            request.compression,
            load_text(pipeline.text, pipeline.handle.tokenizer),
            allocator=request.allocation,
            compression_ratio=request.compression_ratio,
            progress=progress,
        )
    for point in points:
        kl = "diverged" if point.kl is None else f"KL {point.kl:.6f} on validation text"
        print(f"gradient damping {point.gradient_damping:g}, beta {point.drift_beta:g}: {kl}", file=sys.stderr)
    return config, points


def _test_text(handle: ModelHandle, text: TextConfig) -> tuple[HeldOut | None, tuple[str, ...]]:
    """Return what the written folder is measured on; without it, why not."""
    try:
        return held_out(handle, text), ()
    except TextError as error:
        return None, (f"the written model is not measured: {error}",)

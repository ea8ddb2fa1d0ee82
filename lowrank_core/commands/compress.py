"""``lowrank compress``: calibrate, factorise, allocate, compress and write."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from lowrank_core.allocation import (
    RankAllocation,
    allocation_from_ranks,
    allocator_named,
    read_allocation,
    read_ranks,
    unspent_parameters,
    unspent_warning,
)
from lowrank_core.allocation.byte_budget import bytes_for_ratio, chosen_words, stored_bytes_of
from lowrank_core.allocation.units import check_reachable
from lowrank_core.commands.shared import Stages, coverage_warnings, estimate_result, reported, warn
from lowrank_core.compression.estimate import TimedPieces
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.compression.truncations import cost_in_words
from lowrank_core.compression.tuning import TuningPoint, tune
from lowrank_core.config import CompressionConfig, CompressRequest, ModelSource, TextConfig, to_mapping
from lowrank_core.errors import BudgetError, ConfigError, TextError
from lowrank_core.export import HeldOut, check_form, check_free, check_precision, export, held_out
from lowrank_core.export.card import written_words
from lowrank_core.export.manifest import report_of
from lowrank_core.export.precision import written_dtype
from lowrank_core.metrics import metric_of
from lowrank_core.models import ModelHandle, notes_of
from lowrank_core.parameters import Unit
from lowrank_core.runs.stage_times import TimeEstimate, stages_of_compression, stages_of_quantization
from lowrank_core.statistics.processes import end_helpers
from lowrank_core.text import load_text, overlap_warnings
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
    metric_of(request.compression)  # bad names, like a bad file, are reported before anything is loaded
    rule = allocator_named(request.complete or request.allocation)
    if request.tune and rule.needs_weights:
        raise ConfigError(
            f"--tune would measure the weights of {rule.name} at every setting. Tune with another allocation, or leave it out."
        )
    fixed = read_allocation(request.ranks).fixed if request.ranks is not None and request.complete is not None else {}
    named = {layer for unit in (read_ranks(request.ranks) if request.ranks is not None else ()) for layer in unit.split("+")}
    stages = Stages()
    pipeline = Pipeline(source, text, calibration=request.calibration, compression=request.compression, progress=stages.stage, whole=named)
    handle, units = pipeline.handle, pipeline.units
    whole = request.stays_dense
    allocation = pipeline.dense_allocation if whole else _manual(request, units)  # bad ranks are reported before minutes of calibration
    if request.compression_ratio is not None and request.budget == "parameters":
        check_reachable(units, request.compression_ratio, request.compression)
    narrow = coverage_warnings(handle, request.compression_ratio)
    _ = pipeline.calibration_windows  # a text that can't be read is reported as such
    stages.plan(pipeline, _stages(request))
    test, lacks = _test_text(handle, text)
    repeats = () if test is None else overlap_warnings(pipeline.calibration_windows, test.windows)
    check_form(handle, metric_of(request.compression), request.export)
    check_precision(handle, request.export, None if test is None else test.windows)
    statistics = None if whole and request.export.rounding == "nearest" else reported(pipeline.moments if whole else pipeline.statistics)
    end_helpers()
    compression, tuning = _tuned(pipeline, request, stages) if request.tune else (request.compression, ())
    pipeline = pipeline.under(compression)
    if request.budget == "bytes":
        allocation = _of_bytes(request, pipeline)
    elif allocation is None:
        assert request.compression_ratio is not None
        decomposed = pipeline.decomposed
        weights = None
        if request.error_weights:
            validation = pipeline.validation_windows
            reference, deep = pipeline.dense_reference(validation), request.deep_weights
            weights = pipeline.error_weights(request.compression_ratio, validation, reference, deep=deep, fixed=fixed)
        if rule.needs_perplexities:
            cost = cost_in_words(decomposed, pipeline.calibration_windows)
            print(f"{rule.name}: {cost} of calibration text, kept for the next ratio", file=sys.stderr)
        allocation = pipeline.allocate(rule.name, request.compression_ratio, fixed=fixed, weights=weights)
        if (bias := pipeline.depth_bias) is not None:
            print(f"{rule.name}: depth bias of alpha {bias.alpha:.3g} and gamma {bias.gamma:.3g}, by validation text", file=sys.stderr)
    counted = request.compression_ratio is not None and request.budget == "parameters"
    unspent = None if not counted or request.compression_ratio is None else unspent_parameters(units, request.compression_ratio, allocation)
    lost = _unspent(request, units, allocation)
    doubted = () if whole else pipeline.decomposed.warnings(allocation.allocator, weighted=request.error_weights)
    doubts = warn(*doubted, *lost, *lacks, *repeats)
    model = pipeline.compress(allocation, dtype=written_dtype(handle, request.export), rounding=request.export.rounding)
    provenance = {
        "preset": "" if whole else request.preset,
        "allocation": allocation.label,
        "text": text.reference,
        "seed": text.seed,
        "error_weights": request.error_weights,
        "deep_weights": request.deep_weights,
        "depth_bias": None if pipeline.depth_bias is None else to_mapping(pipeline.depth_bias),
        **({} if whole else to_mapping(compression)),
        "rounding": request.export.rounding if request.export.quantizes or allocation.grids else "",
        "budget": request.budget,
        "tuning": [to_mapping(point) for point in tuning],
        "warnings": list(doubts),
        "command": request.command,
    }
    with stages.stage("Writing and measuring") as progress:
        moments = pipeline.input_moment
        written = export(model, request.out, provenance=provenance, config=request.export, test=test, moments=moments, progress=progress)
    report = report_of(written)  # of what was written: quantised matrices have scales
    result = {
        "out": str(request.out),
        "preset": request.preset,
        "tuning": provenance["tuning"],
        "depth_bias": provenance["depth_bias"],
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
        "grids": dict(report.grids),
        **({} if request.budget == "parameters" else _bytes_spent(request, pipeline, allocation)),
        "written_parameters": written.written_parameters,
        "written_bytes": written.written_bytes,
        "perplexity": None if written.measured is None else written.measured.perplexity,
        "coverage": report.dense_coverage.to_mapping(),
        "warnings": [*notes_of(source.reference), *narrow, *(statistics.warnings() if statistics else ()), *doubts],
        "stages": stages.seconds,
        "seconds": time.perf_counter() - began,
    }
    took = ", ".join(f"{name} {duration(of['seconds'])}" for name, of in stages.seconds.items())
    chosen = _choices_line(chosen_words(allocation)) if request.budget == "bytes" else ""
    result["text"] = f"Wrote {request.out}: {written_words(written)}\n{chosen}Time: {took}; {duration(time.perf_counter() - began)} in all."
    return result


def _byte_budget(request: CompressRequest, pipeline: Pipeline) -> int:
    assert request.compression_ratio is not None
    return bytes_for_ratio(pipeline.decomposed.problem(request.compression_ratio))


def _of_bytes(request: CompressRequest, pipeline: Pipeline) -> RankAllocation:
    dtype = written_dtype(pipeline.handle, request.export)
    return pipeline.allocate_bytes(_byte_budget(request, pipeline), dtype=dtype, rounding=request.export.rounding)


def _bytes_spent(request: CompressRequest, pipeline: Pipeline, allocation: RankAllocation) -> Result:
    """Return the budget, what is spent of it, and the choice of each unit."""
    itemsize = written_dtype(pipeline.handle, request.export).itemsize
    spent = stored_bytes_of(allocation, pipeline.units, itemsize)
    return {"byte_budget": _byte_budget(request, pipeline), "compressible_bytes": spent, "choices": chosen_words(allocation)}


def _choices_line(choices: Mapping[str, str]) -> str:
    """Return how many units got which form and grid."""
    counts = Counter(f"{'factors' if words.startswith('rank') else 'dense'} in {words.split(', ')[1]}" for words in choices.values())
    return f"Chosen: {', '.join(f'{count} units {words}' for words, count in counts.most_common())}.\n"


def _stages(request: CompressRequest) -> tuple[str, ...]:
    if request.stays_dense:
        return stages_of_quantization(gptq=request.export.rounding == "gptq")
    name = request.complete or (None if request.ranks is not None else request.allocation)
    rule = None if name is None else allocator_named(name)
    trials = rule is not None and rule.needs_weights
    weights, cut = request.error_weights or trials, rule is not None and rule.needs_perplexities
    return stages_of_compression(request.compression, tune=request.tune, weights=weights, cut=cut, trials=trials)


def estimate(source: ModelSource, text: TextConfig, request: CompressRequest) -> Result:
    """Time pieces of every stage of ``compress_to``; nothing is compressed, and nothing written but the machine's record.

    Raises:
        LowRankError: as ``compress_to``, as far as the pieces reach.
    """
    pipeline = Pipeline(source, text, calibration=request.calibration, compression=request.compression)
    rule = "uniform" if allocator_named(request.allocation).measures else request.allocation
    ratio = _USUAL_RATIO if request.compression_ratio is None or request.budget == "bytes" else request.compression_ratio
    pieces = TimedPieces(pipeline, compression_ratio=ratio, allocator=rule)
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
    if request.compression_ratio is None or not allocation.allocator or request.budget == "bytes":
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

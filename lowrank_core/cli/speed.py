"""``lowrank speed``."""

from __future__ import annotations

import argparse
from dataclasses import replace

from lowrank_core.cli.options import Command, add_options, config_of, model_options, source_of
from lowrank_core.cli.tables import aligned
from lowrank_core.config import to_mapping
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.runs.measurements import SpeedComparison, SpeedReport
from lowrank_core.studio.shared.formatting import DASH, sizes
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("speed", "Measure tokens per second, the time to the first token and peak memory, dense next to compressed.", run)
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model: both are timed in alternation")
    add_options(parser, SpeedConfig)
    memory = "measure peak memory too, in a fresh process for each model"
    parser.add_argument("--peak-memory", action=argparse.BooleanOptionalAction, default=True, help=f"{memory} (default: yes)")


def run(arguments: argparse.Namespace) -> Result:
    a = arguments
    config, source = config_of(a, SpeedConfig), source_of(a)
    from lowrank_core.models import load_model
    from lowrank_core.speed import compare_speed, measure_speed

    handle = load_model(source)
    if a.against is None:
        report = measure_speed(handle, config, source=source if a.peak_memory else None)
        return {**to_mapping(report), "text": _alone(report)}
    against = replace(source, reference=a.against)
    comparison = compare_speed(load_model(against), handle, config, sources=(against, source) if a.peak_memory else None)
    return {**comparison.to_mapping(), "text": _beside(comparison)}


def _rows(*reports: SpeedReport) -> list[tuple[str, ...]]:
    """Return a row for each measure: its name, and a cell for each report; sizes of a row are in one unit."""
    memories = [report.memory for report in reports]
    return [
        ("prefill, tokens/s", *(report.prefill_tokens_per_second.words(digits=1) for report in reports)),
        ("decode, tokens/s", *(report.decode_tokens_per_second.words(digits=1) for report in reports)),
        ("TTFT, ms", *(report.first_token_seconds.words(1e3, 1) for report in reports)),
        ("peak memory, running", *sizes(memory.running if memory else None for memory in memories)),
        ("peak memory, loading", *sizes(memory.loading if memory else None for memory in memories)),
        ("parameters", *(f"{report.parameters:,}" for report in reports)),
        ("stored", *sizes(report.bytes for report in reports)),
    ]


def _notes(report: SpeedReport) -> str:
    return report.protocol if report.memory is None else f"{report.protocol}\nMemory: {report.memory.measured}."


def _alone(report: SpeedReport) -> str:
    return f"{aligned([('', report.model), *_rows(report)])}\n{_notes(report)}"


def _beside(comparison: SpeedComparison) -> str:
    dense, compressed = comparison.dense, comparison.compressed
    spreads = (comparison.prefill_speedup, comparison.decode_speedup, comparison.first_token_speedup)
    memory = DASH if comparison.memory_ratio is None else f"{comparison.memory_ratio:.2f}"
    counts = (f"{compressed.parameters / dense.parameters:.2f}", f"{compressed.bytes / dense.bytes:.2f}")
    ratios = (*(spread.words(digits=2) for spread in spreads), memory, _loading(comparison), *counts)
    rows = [(*row, ratio) for row, ratio in zip(_rows(dense, compressed), ratios, strict=True)]
    table = aligned([("", "dense", "compressed", "times faster; size ratio"), *rows])
    return f"{table}\nTimed in alternation; above 1 the compressed model is faster. {_notes(compressed)}"


def _loading(comparison: SpeedComparison) -> str:
    ours, theirs = comparison.compressed.memory, comparison.dense.memory
    if ours is None or theirs is None or ours.loading is None or not theirs.loading:
        return DASH
    return f"{ours.loading / theirs.loading:.2f}"

"""``lowrank speed``."""

from __future__ import annotations

import argparse
from dataclasses import replace

from lowrank_core.cli.options import Command, add_options, config_of, model_options, source_of
from lowrank_core.cli.tables import aligned
from lowrank_core.config import to_mapping
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.runs.measurements import SpeedComparison, SpeedReport
from lowrank_core.studio.shared.formatting import DASH, size
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("speed", "Measure tokens per second, the time to the first token and peak memory, dense next to compressed.", run)
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model: both are timed in alternation")
    add_options(parser, SpeedConfig)
    memory = "measure peak memory too, in a fresh process for each model"
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help=f"{memory} (default: yes)")


def run(arguments: argparse.Namespace) -> Result:
    a = arguments
    config, source = config_of(a, SpeedConfig), source_of(a)
    from lowrank_core.models import load_model
    from lowrank_core.speed import compare_speed, measure_speed

    handle = load_model(source)
    if a.against is None:
        report = measure_speed(handle, config, source=source if a.memory else None)
        return {**to_mapping(report), "text": _alone(report)}
    against = replace(source, reference=a.against)
    comparison = compare_speed(load_model(against), handle, config, sources=(against, source) if a.memory else None)
    return {**comparison.to_mapping(), "text": _beside(comparison)}


def _cells(report: SpeedReport) -> list[str]:
    memory = report.memory
    return [
        report.prefill_tokens_per_second.words(digits=1),
        report.decode_tokens_per_second.words(digits=1),
        report.first_token_seconds.words(1e3, 1),
        size(memory.running if memory else None),
        size(memory.loading if memory else None),
        f"{report.parameters:,}",
        size(report.bytes),
    ]


_ROWS = ("prefill, tokens/s", "decode, tokens/s", "TTFT, ms", "peak memory, running", "peak memory, loading", "parameters", "stored")


def _table(columns: list[list[str]]) -> str:
    """Return columns, each with its heading first, as lines of text."""
    return aligned(list(zip(["", *_ROWS], *columns, strict=True)))


def _notes(report: SpeedReport) -> str:
    return report.protocol if report.memory is None else f"{report.protocol}\nMemory: {report.memory.measured}."


def _alone(report: SpeedReport) -> str:
    return f"{_table([[report.model, *_cells(report)]])}\n{_notes(report)}"


def _beside(comparison: SpeedComparison) -> str:
    dense, compressed = comparison.dense, comparison.compressed
    spreads = (comparison.prefill_speedup, comparison.decode_speedup, comparison.first_token_speedup)
    memory = DASH if comparison.memory_ratio is None else f"{comparison.memory_ratio:.2f}"
    sizes = [f"{compressed.parameters / dense.parameters:.2f}", f"{compressed.bytes / dense.bytes:.2f}"]
    ratios = ["times faster; size ratio", *(spread.words(digits=2) for spread in spreads), memory, _loading(comparison), *sizes]
    table = _table([["dense", *_cells(dense)], ["compressed", *_cells(compressed)], ratios])
    return f"{table}\nTimed in alternation; above 1 the compressed model is faster. {_notes(compressed)}"


def _loading(comparison: SpeedComparison) -> str:
    ours, theirs = comparison.compressed.memory, comparison.dense.memory
    if ours is None or theirs is None or ours.loading is None or not theirs.loading:
        return DASH
    return f"{ours.loading / theirs.loading:.2f}"

"""``lowrank speed``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from lowrank_core.cli.options import Command, add_options, config_of, model_options, source_of
from lowrank_core.cli.tables import aligned
from lowrank_core.config import ModelSource, to_mapping
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.runs.measurements import SpeedComparison, SpeedReport
from lowrank_core.studio.shared.formatting import DASH, sizes
from lowrank_core.types import Result

__all__ = ["add"]

Results = Sequence[SpeedReport | SpeedComparison]


def add(command: Command) -> None:
    parser = command("speed", "Measure tokens per second, the time to the first token and peak memory, dense next to compressed.", run)
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model: both are timed in alternation")
    engine = "what runs the models: transformers, or vllm where it is installed (default: %(default)s)"
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help=engine)
    add_options(parser, SpeedConfig, without=("batch_size",))
    batches = "prompts that are continued at once; several sizes are measured one after the other (default: 1)"
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="N", help=batches)
    memory = "measure peak memory too, in a fresh process for each model"
    parser.add_argument("--peak-memory", action=argparse.BooleanOptionalAction, default=True, help=f"{memory} (default: yes)")


def run(arguments: argparse.Namespace) -> Result:
    config, source = config_of(arguments, SpeedConfig), source_of(arguments)
    configs = [replace(config, batch_size=size) for size in dict.fromkeys(arguments.batch_size or [config.batch_size])]
    sources = (source,) if arguments.against is None else (replace(source, reference=arguments.against), source)
    measure = _in_vllm if arguments.engine == "vllm" else _in_transformers
    results = measure(sources, configs, arguments.peak_memory)
    text = "\n\n".join(_beside(result) if isinstance(result, SpeedComparison) else _alone(result) for result in results)
    bodies = [result.to_mapping() if isinstance(result, SpeedComparison) else to_mapping(result) for result in results]
    if len(bodies) == 1:
        return {**bodies[0], "text": text}
    return {"batches": {str(each.batch_size): body for each, body in zip(configs, bodies, strict=True)}, "text": text}


def _in_transformers(sources: Sequence[ModelSource], configs: Sequence[SpeedConfig], peak_memory: bool) -> Results:
    from lowrank_core.models import load_model
    from lowrank_core.speed import compare_speed, measure_speed

    handles = [load_model(source) for source in sources]
    if len(handles) == 1:
        return [measure_speed(handles[0], config, source=sources[0] if peak_memory else None) for config in configs]
    pair = (sources[0], sources[1]) if peak_memory else None
    return [compare_speed(handles[0], handles[1], config, sources=pair) for config in configs]


def _in_vllm(sources: Sequence[ModelSource], configs: Sequence[SpeedConfig], peak_memory: bool) -> Results:
    from lowrank_core.speed.comparison import compared
    from lowrank_core.speed.vllm import speed_in_vllm

    results = speed_in_vllm(sources, configs, peak_memory=peak_memory)
    if len(sources) == 1:
        return [result.reports[0] for result in results]
    return [compared(result.reports, result.timings) for result in results]


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
    return f"{table}\nTimed in alternation; above 1 the compressed model is faster.{_slower(comparison)} {_notes(compressed)}"


def _slower(comparison: SpeedComparison) -> str:
    """Return what the compressed model is slower in, in every round; empty where that is nothing."""
    spreads = {"prefill": comparison.prefill_speedup, "decode": comparison.decode_speedup, "TTFT": comparison.first_token_speedup}
    slower = [f"{name} ({spread.median:.2f} times)" for name, spread in spreads.items() if spread.high < 1]
    return f" Slower than the dense model here: {', '.join(slower)}." if slower else ""


def _loading(comparison: SpeedComparison) -> str:
    ours, theirs = comparison.compressed.memory, comparison.dense.memory
    if ours is None or theirs is None or ours.loading is None or not theirs.loading:
        return DASH
    return f"{ours.loading / theirs.loading:.2f}"

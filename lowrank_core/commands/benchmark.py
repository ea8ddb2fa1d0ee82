"""``lowrank benchmark``: a result as a mapping and as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_core.commands.benchmarks import allocation as allocation_benchmark
from lowrank_core.commands.benchmarks import quality as quality_benchmark
from lowrank_core.commands.benchmarks import search as search_benchmark
from lowrank_core.commands.benchmarks import speed as speed_benchmark
from lowrank_core.config import ModelSource, TextConfig, check_ratio, to_mapping
from lowrank_core.models import load_model
from lowrank_core.presets.recipes import PRESETS, preset_named
from lowrank_core.text import load_windows
from lowrank_core.types import Result

__all__ = ["benchmark_allocation", "benchmark_quality", "benchmark_search", "benchmark_speed"]


def benchmark_allocation(source: ModelSource, text: TextConfig, ratios: Sequence[float], *, seeds: int, trials: int) -> Result:
    """Measure uniform, lord_manual and the search's best on test text."""
    rows = allocation_benchmark.allocation_table(source, text, ratios, seeds=seeds, trials=trials)
    return {"rows": [to_mapping(row) for row in rows], "text": allocation_benchmark.as_markdown(rows)}


def benchmark_quality(
    source: ModelSource,
    text: TextConfig,
    ratios: Sequence[float],
    *,
    presets: Sequence[str] | None = None,
    variants: bool,
    search: bool,
    int8: bool = False,
) -> Result:
    """Measure every preset, or those named, at equal parameters on test text."""
    chosen = [preset_named(name) for name in presets or PRESETS]
    for ratio in ratios:
        check_ratio(ratio)
    rows = quality_benchmark.quality_table(source, text, ratios, presets=chosen, variants=variants, search=search, int8=int8)
    return {"model": source.reference, "rows": [to_mapping(row) for row in rows], "text": quality_benchmark.as_markdown(rows)}


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
        "curves": [to_mapping(curve) for curve in curves],
        "cheaper": [to_mapping(row) for row in cheaper],
        "protocol": protocol,
        "text": search_benchmark.as_markdown(curves, cheaper, protocol),
    }


def benchmark_speed(source: ModelSource, text: TextConfig) -> Result:
    """Compare calibration, a trial and the layers with forward passes and dense layers."""
    rows = speed_benchmark.speed_table(source, text)
    return {"model": source.reference, "rows": [to_mapping(row) for row in rows], "text": speed_benchmark.as_markdown(rows)}

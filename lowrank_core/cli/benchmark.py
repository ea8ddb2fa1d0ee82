"""``lowrank benchmark``: the README's tables."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lowrank_core.cli.options import Command, Parser, json_option, model_options, source_of, text_of, text_options
from lowrank_core.errors import ConfigError
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("benchmark", "Benchmark methods and their cost (the tables of docs/results.md).")
    parser.set_defaults(run=run)
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="KIND", parser_class=Parser)

    def kind(name: str, summary: str) -> argparse.ArgumentParser:
        result = kinds.add_parser(name, help=summary, description=summary)
        model_options(result)
        text_options(result)
        return result

    quality = kind("quality", "Perplexity and KL of every preset on test text, at equal parameters.")
    _ratios(quality, 0.2, 0.4, 0.6)
    quality.add_argument("--presets", nargs="+", metavar="P", help="some of the presets (default: all)")
    quality.add_argument("--variants", action="store_true", help="also our default with one part left out or changed")
    quality.add_argument("--search", action="store_true", help="also the paper's search, as published (50 trials for each ratio)")
    quality.add_argument("--int8", action="store_true", help="also with int8 factors, in separate columns")
    quality.add_argument("--plot", type=Path, metavar="FILE", help="write the figure as a self-contained HTML file")
    kind("speed", "Time ratios: calibration and a trial against forward passes, factored and pivoted layers against dense ones.")
    search = kind("search", "Convergence of searches (Bolaco as published, random, Studio) over seeds, and the effect of cheaper trials.")
    _ratios(search, 0.4)
    search.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    search.add_argument("--trials", type=int, default=50, metavar="N", help="trials of each search (default: %(default)s)")
    search.add_argument("--schemes", nargs="+", metavar="S", help="some of what is compared (default: all)")
    search.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as a self-contained HTML file")
    allocation = kind("allocation", "Bolaco's metric with uniform, fixed and searched ranks on test text.")
    _ratios(allocation, 0.2, 0.3)
    allocation.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    allocation.add_argument("--trials", type=int, default=30, metavar="N", help="trials of each search (default: %(default)s)")
    summary = "Load times and traffic of the dashboard's pages in a headless browser; needs playwright and Chromium."
    dashboard = kinds.add_parser("dashboard", help=summary, description=summary)
    dashboard.add_argument("--rounds", type=int, default=5, metavar="N", help="openings of each page (default: %(default)s)")
    dashboard.add_argument("--updates", type=int, default=8, metavar="N", help="trials that come in on each page (default: %(default)s)")
    dashboard.add_argument("--trials", type=int, default=20, metavar="N", help="trials before those (default: %(default)s)")
    json_option(dashboard)


def _ratios(parser: argparse.ArgumentParser, *values: float) -> None:
    words = " ".join(f"{value:g}" for value in values)
    parser.add_argument("--compression-ratio", type=float, nargs="+", default=values, metavar="R", help=f"ratios (default: {words})")


def run(arguments: argparse.Namespace) -> Result:
    if arguments.benchmark == "dashboard":
        return _dashboard(arguments)
    from lowrank_core.commands import benchmark as benchmark_commands

    source, text = source_of(arguments), text_of(arguments)
    if arguments.benchmark == "speed":
        return benchmark_commands.benchmark_speed(source, text)
    ratios = arguments.compression_ratio
    if arguments.benchmark == "allocation":
        return benchmark_commands.benchmark_allocation(source, text, ratios, seeds=arguments.seeds, trials=arguments.trials)
    plot: Path | None = arguments.plot
    if plot is not None and not (plot.parent.is_dir() and os.access(plot.parent, os.W_OK)):
        raise ConfigError(f"can't write {plot}: {plot.parent} is no folder that you can write to. Give another file with --plot.")
    if arguments.benchmark == "search":
        result = benchmark_commands.benchmark_search(
            source, text, ratios, seeds=arguments.seeds, trials=arguments.trials, schemes=arguments.schemes
        )
    else:
        result = benchmark_commands.benchmark_quality(
            source, text, ratios, presets=arguments.presets, variants=arguments.variants, search=arguments.search, int8=arguments.int8
        )
    if plot is not None:
        _drawn(arguments.benchmark, result).write_html(plot, include_plotlyjs=True)
    return result


def _dashboard(arguments: argparse.Namespace) -> Result:
    from tests.benchmarks import dashboard

    report = dashboard.measure_dashboard(rounds=arguments.rounds, updates=arguments.updates, trials=arguments.trials)
    return {**report.to_mapping(), "text": dashboard.as_markdown(report)}


def _drawn(benchmark: str, result: Result) -> Any:
    from lowrank_core.studio.shared.benchmark_chart import convergence_figure, quality_figure

    if benchmark == "search":
        return convergence_figure(result["curves"], str(result["protocol"]))  # type: ignore[arg-type]
    return quality_figure(result["rows"])  # type: ignore[arg-type]

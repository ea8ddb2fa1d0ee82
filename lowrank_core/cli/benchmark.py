"""``lowrank benchmark``: the README's tables."""

from __future__ import annotations

import argparse
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lowrank_core.cli.options import Command, Parser, add_options, config_of, json_option, model_options, source_of, text_of, text_options
from lowrank_core.config.benchmarks import (
    AllocationBenchmark,
    DecompositionBenchmark,
    PaceBenchmark,
    QualityBenchmark,
    SearchBenchmark,
    SpeedBenchmark,
)
from lowrank_core.errors import ConfigError
from lowrank_core.types import Result

__all__ = ["add"]

_KINDS = {
    "quality": QualityBenchmark,
    "speed": SpeedBenchmark,
    "search": SearchBenchmark,
    "allocation": AllocationBenchmark,
    "pace": PaceBenchmark,
}
_DRAWN = {"quality": "the figure", "search": "the curves"}


def add(command: Command) -> None:
    parser = command("benchmark", "Benchmark methods and their cost (the tables of docs/results.md).")
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="KIND", parser_class=Parser)
    for name, kind in _KINDS.items():
        summary = (kind.__doc__ or "").strip()
        result = kinds.add_parser(name, help=summary, description=summary)
        model_options(result)
        text_options(result)
        add_options(result, kind)
        if name in _DRAWN:
            result.add_argument("--plot", type=Path, metavar="FILE", help=f"write {_DRAWN[name]} as a self-contained HTML file")
        json_option(result)
        result.set_defaults(run=partial(run, kind=kind))
    _add_decomposition(kinds)
    _add_dashboard(kinds)


def _add_decomposition(kinds: Any) -> None:
    summary = (DecompositionBenchmark.__doc__ or "").strip()
    result = kinds.add_parser("decomposition", help=summary, description=summary)
    add_options(result, DecompositionBenchmark)
    json_option(result)
    result.set_defaults(run=run_decomposition)


def _add_dashboard(kinds: Any) -> None:
    summary = "Load times and traffic of the dashboard's pages in a headless browser; needs playwright and Chromium."
    dashboard = kinds.add_parser("dashboard", help=summary, description=summary)
    dashboard.add_argument("--rounds", type=int, default=5, metavar="N", help="openings of each page (default: %(default)s)")
    dashboard.add_argument("--updates", type=int, default=8, metavar="N", help="trials that come in on each page (default: %(default)s)")
    dashboard.add_argument("--trials", type=int, default=20, metavar="N", help="trials before those (default: %(default)s)")
    json_option(dashboard)
    dashboard.set_defaults(run=run_dashboard)


def run(arguments: argparse.Namespace, kind: type) -> Result:
    """Run one of the benchmarks, and draw it where a file is given."""
    source, text = source_of(arguments), text_of(arguments)
    config: object = config_of(arguments, kind)
    plot: Path | None = getattr(arguments, "plot", None)
    if plot is not None and not (plot.parent.is_dir() and os.access(plot.parent, os.W_OK)):
        raise ConfigError(f"can't write {plot}: {plot.parent} is no folder that you can write to. Give another file with --plot.")
    result: Result = import_module(f"lowrank_core.commands.benchmarks.{arguments.benchmark}").benchmark(source, text, config)
    if plot is not None:
        _drawn(arguments.benchmark, result).write_html(plot, include_plotlyjs=True)
    return result


def run_decomposition(arguments: argparse.Namespace) -> Result:
    """Decompose matrices that need no model."""
    from lowrank_core.commands.benchmarks import decomposition

    return decomposition.benchmark(config_of(arguments, DecompositionBenchmark))


def run_dashboard(arguments: argparse.Namespace) -> Result:
    """Measure the pages of the dashboard."""
    from tests.benchmarks import dashboard

    report = dashboard.measure_dashboard(rounds=arguments.rounds, updates=arguments.updates, trials=arguments.trials)
    return {**report.to_mapping(), "text": dashboard.as_markdown(report)}


def _drawn(benchmark: str, result: Result) -> Any:
    from lowrank_core.studio.shared.benchmark_chart import convergence_figure, quality_figure

    if benchmark == "search":
        return convergence_figure(result["curves"], str(result["protocol"]))  # type: ignore[arg-type]
    return quality_figure(result["rows"])  # type: ignore[arg-type]

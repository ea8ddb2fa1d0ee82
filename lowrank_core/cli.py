"""``lowrank``: parse, call, print. Exit status 0; 2 for bad input (one line on stderr); 1 for a failure."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lowrank_core import __version__
from lowrank_core.accounting import STORAGES
from lowrank_core.allocation import ALLOCATORS
from lowrank_core.bases import BASES
from lowrank_core.catalogue import methods
from lowrank_core.config import (
    OBJECTIVES,
    PRUNERS,
    ROBUST_RULES,
    SAMPLERS,
    SPACES,
    VARIABLES,
    CalibrationConfig,
    CompressionConfig,
    CompressRequest,
    ModelSource,
    SearchConfig,
    TextConfig,
)
from lowrank_core.errors import Cancelled, ConfigError, LowRankError, NumericalError
from lowrank_core.presets import DEFAULT_PRESET, PRESETS, Preset, preset_named

if TYPE_CHECKING:
    from lowrank_core.search_commands import SearchPlace

__all__ = ["main"]

Result = dict[str, object]
_SEARCH = SearchConfig()
_TEXT_HELP = "python-stdlib, file:PATH (.txt, .jsonl, .parquet), wikitext-2, c4, ptb, or NAME:FOLDER for a local copy of those"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="demo, a local folder, or a hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: float32 on a CPU, the checkpoint's elsewhere)")


def _text_options(parser: argparse.ArgumentParser, defaults: TextConfig, windows: str = "calibration_windows") -> None:
    parser.add_argument("--text", required=True, metavar="T", help=_TEXT_HELP)
    parser.add_argument("--windows", type=int, metavar="N", help=f"{windows.replace('_', ' ')} (default: {getattr(defaults, windows)})")
    parser.add_argument(
        "--context", type=int, metavar="L", help=f"tokens in a window (default: {defaults.context}, or what the model takes if less)"
    )
    parser.add_argument("--bos", default=defaults.bos, help="auto, window or none (default: %(default)s, as the tokenizer does)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the calibration draw and the sampler (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def _calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--robust", default="none", metavar="RULE", help=f"pooling: one of {', '.join(ROBUST_RULES)} (default: none)")


def _compression_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="P", help=f"a whole recipe: one of {', '.join(PRESETS)} (default: {default})")
    parser.add_argument("--basis", metavar="B", help=f"one of {', '.join(BASES)}, or around another (shared_input:two_sided)")
    parser.add_argument("--storage", metavar="S", help=f"how factors are stored: {' or '.join(STORAGES)}")
    parser.add_argument(
        "--compress-value",
        action=argparse.BooleanOptionalAction,
        help="compress the value projections too; the paper keeps them dense",
    )
    slopes = "weigh errors by what they cost the model, measured unit by unit (for marginal, where a basis' errors are not comparable)"
    parser.add_argument("--slopes", action="store_true", default=None, help=slopes)
    for name, meaning in _NUMBERS.items():
        usual = getattr(CompressionConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=f"{meaning} (default: {usual:g})")


def _search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--most-ratio", type=float, metavar="R", help="search every ratio up to this one: the answer is a Pareto front")
    parser.add_argument("--space", help=f"one of {', '.join(SPACES)}, or `types x N` with N depth groups (default: {_SEARCH.space})")
    parser.add_argument(
        "--variables", help=f"what a variable multiplies: {' or '.join(VARIABLES)} (default: the preset's, or {_SEARCH.variables})"
    )
    parser.add_argument("--sampler", help=f"one of {', '.join(SAMPLERS)} (default: {_SEARCH.sampler})")
    parser.add_argument("--objective", help=f"one of {', '.join(OBJECTIVES)} (default: {_SEARCH.objective}, or the preset's)")
    parser.add_argument("--trials", type=int, metavar="N", help=f"trials, baselines included (default: {_SEARCH.trials}, or the preset's)")
    parser.add_argument("--startup-trials", type=int, metavar="N", help=f"before a sampler's model (default: {_SEARCH.startup_trials})")
    parser.add_argument("--pruner", help=f"stop bad trials early: {' or '.join(PRUNERS)} (default: {_SEARCH.pruner})")
    parser.add_argument("--top-k", type=int, metavar="K", help="KL on the dense model's K likeliest tokens and the rest (default: 0, all)")
    parser.add_argument("--autocast", action="store_true", default=None, help="run trials in bfloat16")
    parser.add_argument("--confirmed", type=int, metavar="N", help=f"best trials measured on test text (default: {_SEARCH.confirmed})")
    parser.add_argument("--ranks", type=Path, metavar="FILE", help="a hand-picked allocation, measured first")
    parser.add_argument("--complete", metavar="A", help="complete a partial --ranks within the budget by an allocation")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: %(default)s)")
    parser.add_argument("--storage-url", metavar="URL", help="keep the study in a database, where workers of other machines join it")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="new folder for the run")


_SEARCH_FIELDS = (
    *("most_ratio", "space", "variables", "slopes", "sampler", "objective", "trials", "startup_trials"),
    *("pruner", "top_k", "autocast", "confirmed"),
)


def _parser() -> argparse.ArgumentParser:
    defaults = TextConfig()
    parser = _Parser(prog="lowrank", description="See where a language model is low-rank, search for ranks, keep a smaller model.")
    parser.add_argument("--version", action="version", version=f"lowrank {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary)

    analyze = command("analyze", "Measure spectra and feature covariances of every compressible layer.")
    _model_options(analyze)
    _text_options(analyze, defaults)
    _calibration_options(analyze)

    compress = command("compress", "Compress a model at a ratio (or at given ranks) and write it as a folder.")
    _model_options(compress)
    _text_options(compress, defaults)
    _calibration_options(compress)
    compress.add_argument("--compression-ratio", type=float, metavar="R", help="fraction of the linears' parameters to remove, in (0, 1)")
    _compression_options(compress, f"{DEFAULT_PRESET.name}, unless you choose basis, storage or allocation yourself")
    compress.add_argument("--allocation", metavar="A", help=f"one of {', '.join(ALLOCATORS)} (default: the preset's, or uniform)")
    compress.add_argument("--tune", action="store_true", help="choose the gradient damping and a drift-aware basis's β on validation text")
    compress.add_argument("--ranks", metavar="FILE", help="JSON of layer name to rank or null (dense), instead of an allocation")
    compress.add_argument("--complete", metavar="A", help="keep the locked ranks of the file, and spend the rest of the budget by A")
    compress.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the compressed model")

    evaluate = command("evaluate", "Measure perplexity, and what changed against the dense model.")
    _model_options(evaluate)
    _text_options(evaluate, defaults, "test_windows")
    evaluate.add_argument("--split", choices=("validation", "test", "all"), default="test", help="part of the text (default: %(default)s)")
    evaluate.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, to compare with on the same windows")

    search = command("search", "Search for the ranks that lose least at a compression ratio, then export the best.")
    _model_options(search)
    _text_options(search, defaults)
    _calibration_options(search)
    search.add_argument(
        "--compression-ratio", type=float, required=True, metavar="R", help="fraction of the linears' parameters to remove, in (0, 1)"
    )
    _compression_options(search, f"{DEFAULT_PRESET.name}, unless you choose basis or storage yourself")
    _search_options(search)

    worker = command("worker", "Do what is left to do in a run: start, resume, answer the dashboard; or help with its trials.")
    worker.add_argument("--run", type=Path, metavar="DIR", help="folder of the run")
    worker.add_argument("--warm", type=float, default=0.0, metavar="SECONDS", help="stay and answer requests for so long (default: 0)")
    worker.add_argument("--keep-paused", action="store_true", help="leave a stopped search stopped, and only answer requests")
    worker.add_argument("--more-trials", type=int, metavar="N", help="extend the search by N trials")
    worker.add_argument("--sampler", help=f"go on with another one of {', '.join(SAMPLERS)}")
    worker.add_argument("--join", action="store_true", help="help the worker that holds the run with its trials")
    worker.add_argument("--storage-url", metavar="URL", help="help with a study in a database, from any machine that has the model")
    worker.add_argument("--study", metavar="NAME", help="name of the study there: that of the run's folder")
    worker.add_argument("--model", metavar="M", help="with --storage-url: where the model is on this machine, if elsewhere")
    worker.add_argument("--text", metavar="T", help="with --storage-url: where the text is on this machine, if elsewhere")
    worker.add_argument("--device", help="with --storage-url: auto, cpu, cuda or cuda:N")
    worker.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    enqueue = command("enqueue", "Put a hand-picked allocation in line: the run's worker measures it next.")
    enqueue.add_argument("--run", required=True, type=Path, metavar="DIR", help="folder of the run")
    enqueue.add_argument("--ranks", required=True, type=Path, metavar="FILE", help="JSON of layer name to rank or null (dense)")
    enqueue.add_argument("--complete", metavar="A", help=f"complete a partial choice within the budget: {', '.join(ALLOCATORS)}")
    enqueue.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    export = command("export", "Write the compressed model of a trial as a folder.")
    export.add_argument("--run", required=True, type=Path, metavar="DIR", help="folder of the run")
    export.add_argument("--trial", default="best", help="best or a trial's number (default: %(default)s)")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the compressed model")
    export.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    listed = command("methods", "List bases, allocations and presets, with their sources.")
    listed.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    dashboard = command("dashboard", "Start the dashboard in the browser.")
    dashboard.add_argument("--port", type=int, default=8501, metavar="P", help="port on this machine (default: %(default)s)")

    _add_benchmarks(command("benchmark", "Measure methods against each other, and what they cost (the README's tables)."), defaults)
    return parser


_NUMBERS = {
    "input_damping": "of the inputs' metric, relative to its mean eigenvalue",
    "gradient_damping": "of the output gradients' metric, likewise",
    "drift_beta": "β of a drift-aware basis, from 0 to 1",
}
"""Numbers of ``CompressionConfig`` -> what they are."""


def _add_benchmarks(parser: argparse.ArgumentParser, defaults: TextConfig) -> None:
    kinds = parser.add_subparsers(dest="benchmark", required=True, metavar="KIND", parser_class=_Parser)

    def kind(name: str, summary: str) -> argparse.ArgumentParser:
        found = kinds.add_parser(name, help=summary, description=summary)
        _model_options(found)
        _text_options(found, defaults)
        return found

    def ratios(found: argparse.ArgumentParser, *values: float) -> None:
        words = " ".join(f"{value:g}" for value in values)
        found.add_argument("--compression-ratio", type=float, nargs="+", default=values, metavar="R", help=f"ratios (default: {words})")

    quality = kind("quality", "Perplexity and KL of every preset on test text, at equal parameters.")
    ratios(quality, 0.2, 0.4, 0.6)
    quality.add_argument("--variants", action="store_true", help="also our default with one part left out or changed")
    quality.add_argument("--search", action="store_true", help="also the paper's search, as published (50 trials for each ratio)")
    quality.add_argument("--plot", type=Path, metavar="FILE", help="write the figure as a self-contained HTML file")
    kind("speed", "Time ratios: calibration and a trial against forward passes, factored and pivoted layers against dense ones.")
    search = kind("search", "How fast searches come down: as published, random, and ours, several seeds; and what a cheaper trial changes.")
    ratios(search, 0.4)
    search.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    search.add_argument("--trials", type=int, default=50, metavar="N", help="trials of each search (default: %(default)s)")
    search.add_argument("--schemes", nargs="+", metavar="S", help="some of what is compared (default: all)")
    search.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as a self-contained HTML file")
    allocation = kind("allocation", "The paper's basis with uniform, fixed and searched ranks on test text.")
    ratios(allocation, 0.2, 0.3)
    allocation.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    allocation.add_argument("--trials", type=int, default=30, metavar="N", help="trials of each search (default: %(default)s)")


def _source(arguments: argparse.Namespace) -> ModelSource:
    return ModelSource(arguments.model, arguments.device, arguments.dtype)


def _text(arguments: argparse.Namespace, windows: str = "calibration_windows") -> TextConfig:
    from lowrank_core.commands import fitting_context

    counts = {} if arguments.windows is None else {windows: arguments.windows}
    context = fitting_context(_source(arguments)) if arguments.context is None else arguments.context
    return TextConfig(arguments.text, context=context, bos=arguments.bos, seed=arguments.seed, **counts)


def _calibration(arguments: argparse.Namespace) -> CalibrationConfig:
    return CalibrationConfig(robust=arguments.robust)


def _dashboard(arguments: argparse.Namespace) -> int:
    from lowrank_core.runs import bundled_path

    app = bundled_path("app.py")
    os.chdir(app.parent)  # Streamlit reads its configuration from the working directory
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(app), "--server.port", str(arguments.port)])


def _handlers() -> dict[str, Callable[[argparse.Namespace], Result]]:
    """Import what needs torch only when a command does: ``--help`` answers at once."""
    from lowrank_core import commands, search_commands

    return {
        "analyze": lambda a: commands.analyze(_source(a), _text(a), _calibration(a)),
        "compress": lambda a: commands.compress_to(_source(a), _text(a), _compress_request(a)),
        "evaluate": lambda a: commands.evaluate_on(_source(a), _text(a, "test_windows"), a.split, a.windows, a.against),
        "search": lambda a: search_commands.search_in(_source(a), _text(a), _calibration(a), _search_config(a), _place(a)),
        "worker": _worker,
        "enqueue": lambda a: search_commands.enqueue(a.run, a.ranks, a.complete),
        "export": lambda a: search_commands.export_from(a.run, a.trial, a.out),
        "benchmark": _benchmark,
    }


def _place(arguments: argparse.Namespace) -> SearchPlace:
    from lowrank_core.search_commands import SearchPlace

    return SearchPlace(arguments.run, arguments.storage_url, arguments.workers, arguments.ranks, arguments.complete)


def _worker(arguments: argparse.Namespace) -> Result:
    from lowrank_core import search_commands

    if (arguments.storage_url is None) != (arguments.study is None):
        raise ConfigError("a study in a database has two names: give --storage-url and --study together.")
    if (arguments.run is None) == (arguments.storage_url is None):
        raise ConfigError("say what to work on: either --run DIR, or --storage-url URL and --study NAME.")
    changes = {name: value for name in ("more_trials", "sampler") if (value := getattr(arguments, name)) is not None}
    if changes and (arguments.join or arguments.storage_url is not None):
        raise ConfigError("--more-trials and --sampler change the search; a worker that joins takes it as it is. Leave them out.")
    if arguments.storage_url is not None:
        where = {"model": arguments.model, "text": arguments.text, "device": arguments.device}
        return search_commands.join_study(arguments.storage_url, arguments.study, arguments.warm, **where)
    if arguments.join:
        return search_commands.join(arguments.run, arguments.warm)
    return search_commands.work(arguments.run, arguments.warm, keep_paused=arguments.keep_paused, changes=changes)


def _benchmark(arguments: argparse.Namespace) -> Result:
    from lowrank_core import commands

    source, text = _source(arguments), _text(arguments)
    if arguments.benchmark == "speed":
        return commands.benchmark_speed(source, text)
    if arguments.benchmark == "allocation":
        return commands.benchmark_allocation(source, text, arguments.compression_ratio, seeds=arguments.seeds, trials=arguments.trials)
    plot: Path | None = arguments.plot
    if plot is not None and not (plot.parent.is_dir() and os.access(plot.parent, os.W_OK)):
        raise ConfigError(f"can't write {plot}: {plot.parent} is no folder that you can write to. Give another file with --plot.")
    ratios = arguments.compression_ratio
    if arguments.benchmark == "search":
        result = commands.benchmark_search(source, text, ratios, seeds=arguments.seeds, trials=arguments.trials, schemes=arguments.schemes)
    else:
        result = commands.benchmark_quality(source, text, ratios, variants=arguments.variants, search=arguments.search)
    if plot is not None:
        _drawn(arguments.benchmark, result).write_html(plot, include_plotlyjs=True)
    return result


def _drawn(benchmark: str, result: Result) -> Any:
    from lowrank_core.figures.convergence import convergence_figure
    from lowrank_core.figures.quality import quality_figure

    if benchmark == "search":
        return convergence_figure(result["curves"], str(result["protocol"]))  # type: ignore[arg-type]
    return quality_figure(result["rows"])  # type: ignore[arg-type]


def _compress_request(arguments: argparse.Namespace) -> CompressRequest:
    own = any(getattr(arguments, name) is not None for name in ("basis", "storage", "allocation", "compress_value"))
    preset = preset_named(arguments.preset) if arguments.preset else None if own else DEFAULT_PRESET
    return CompressRequest(
        compression_ratio=arguments.compression_ratio,
        preset=preset.name if preset else "",
        tune=arguments.tune,
        calibration=_calibration(arguments),
        compression=_compression(arguments, preset),
        allocation=arguments.allocation or (preset.allocation if preset else "uniform"),
        ranks=arguments.ranks,
        out=arguments.out,
        complete=arguments.complete,
        slopes=bool(arguments.slopes),
    )


def _compression(arguments: argparse.Namespace, preset: Preset | None) -> CompressionConfig:
    """Return the preset's choices, with those that were given instead."""
    given = {name: value for name in ("basis", "storage", *_NUMBERS) if (value := getattr(arguments, name)) is not None}
    if arguments.compress_value is not None:
        given["value_dense"] = not arguments.compress_value
    return replace(preset.compression if preset else CompressionConfig(), **given)


def _search_config(arguments: argparse.Namespace) -> SearchConfig:
    own = any(getattr(arguments, name) is not None for name in ("basis", "storage", "compress_value"))
    preset = preset_named(arguments.preset) if arguments.preset else None if own else DEFAULT_PRESET
    given = {name: value for name in _SEARCH_FIELDS if (value := getattr(arguments, name)) is not None}
    return replace(
        _SEARCH,
        compression_ratio=arguments.compression_ratio,
        seed=arguments.seed,
        compression=_compression(arguments, preset),
        **{**(preset.search if preset else {}), **given},
    )


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    return f" Go on with `lowrank worker --run {arguments.run}`." if arguments.command in ("search", "worker") else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # Idle threads that spin starve the busy ones as soon as anything else runs on the machine; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parser().parse_args(argv)
    if arguments.command == "dashboard":
        return _dashboard(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints: stdout carries the result alone
            result = methods() if arguments.command == "methods" else _handlers()[arguments.command](arguments)
    except Cancelled:
        print(f"lowrank: stopped.{_how_to_go_on(arguments)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lowrank: interrupted.{_how_to_go_on(arguments)}", file=sys.stderr)
        return 130
    except NumericalError as error:
        print(f"lowrank: {error}", file=sys.stderr)
        return 1
    except LowRankError as error:
        print(f"lowrank: {error}", file=sys.stderr)
        return 2
    text = result.pop("text", "")
    print(json.dumps(result, allow_nan=False) if arguments.json else text)
    return 0

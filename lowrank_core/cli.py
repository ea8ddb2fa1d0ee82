"""``lowrank``: parse, call, print. Exit status 0; 2 for bad input (one line on stderr); 1 for a failure."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lowrank_core import __version__
from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config import (
    OBJECTIVES,
    SAMPLERS,
    SPACES,
    CompressionConfig,
    CompressRequest,
    ModelSource,
    SearchConfig,
    TextConfig,
)
from lowrank_core.errors import Cancelled, LowRankError, NumericalError

__all__ = ["main"]

Result = dict[str, object]
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


def _compression_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--basis", default="pooled_feature", help="pooled_feature (the paper's) or weight_svd (default: %(default)s)")
    parser.add_argument("--storage", default="factored", help="how factors are stored (default: %(default)s)")
    parser.add_argument(
        "--compress-value",
        action="store_true",
        help="compress the value projections too; the paper keeps them dense, and so does the default",
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

    compress = command("compress", "Compress a model at a ratio (or at given ranks) and write it as a folder.")
    _model_options(compress)
    _text_options(compress, defaults)
    compress.add_argument("--compression-ratio", type=float, metavar="R", help="fraction of the linears' parameters to remove, in (0, 1)")
    _compression_options(compress)
    compress.add_argument("--allocation", default="uniform", help=f"one of {', '.join(ALLOCATORS)} (default: %(default)s)")
    compress.add_argument("--ranks", metavar="FILE", help="JSON of layer name to rank or null (dense), instead of an allocation")
    compress.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the compressed model")

    evaluate = command("evaluate", "Measure perplexity, and what changed against the dense model.")
    _model_options(evaluate)
    _text_options(evaluate, defaults, "test_windows")
    evaluate.add_argument("--split", choices=("validation", "test", "all"), default="test", help="part of the text (default: %(default)s)")
    evaluate.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, to compare with on the same windows")

    search = command("search", "Search for the ranks that lose least at a compression ratio, then export the best.")
    _model_options(search)
    _text_options(search, defaults)
    search.add_argument(
        "--compression-ratio", type=float, required=True, metavar="R", help="fraction of the linears' parameters to remove, in (0, 1)"
    )
    _compression_options(search)
    search.add_argument("--space", default="5x1", help=f"one of {', '.join(SPACES)} (default: %(default)s)")
    search.add_argument("--sampler", default="gp", help=f"one of {', '.join(SAMPLERS)} (default: %(default)s)")
    search.add_argument("--objective", default="kl", help=f"one of {', '.join(OBJECTIVES)} (default: %(default)s)")
    search.add_argument("--trials", type=int, default=30, metavar="N", help="trials, baselines included (default: %(default)s)")
    search.add_argument("--run", required=True, type=Path, metavar="DIR", help="new folder for the run")

    worker = command("worker", "Do what is left to do in a run: start, resume, answer the dashboard.")
    worker.add_argument("--run", required=True, type=Path, metavar="DIR", help="folder of the run")
    worker.add_argument("--warm", type=float, default=0.0, metavar="SECONDS", help="stay and answer requests for so long (default: 0)")
    worker.add_argument("--keep-paused", action="store_true", help="leave a stopped search stopped, and only answer requests")
    worker.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    export = command("export", "Write the compressed model of a trial as a folder.")
    export.add_argument("--run", required=True, type=Path, metavar="DIR", help="folder of the run")
    export.add_argument("--trial", default="best", help="best or a trial's number (default: %(default)s)")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the compressed model")
    export.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    dashboard = command("dashboard", "Start the dashboard in the browser.")
    dashboard.add_argument("--port", type=int, default=8501, metavar="P", help="port on this machine (default: %(default)s)")

    benchmark = command("benchmark", "Measure the allocations against each other on test text (the README's table).")
    _model_options(benchmark)
    _text_options(benchmark, defaults)
    benchmark.add_argument("--compression-ratio", type=float, nargs="+", default=[0.2, 0.3], metavar="R", help="ratios (default: 0.2 0.3)")
    benchmark.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    benchmark.add_argument("--trials", type=int, default=30, metavar="N", help="trials of each search (default: %(default)s)")
    return parser


def _source(arguments: argparse.Namespace) -> ModelSource:
    return ModelSource(arguments.model, arguments.device, arguments.dtype)


def _text(arguments: argparse.Namespace, windows: str = "calibration_windows") -> TextConfig:
    from lowrank_core.commands import fitting_context

    counts = {} if arguments.windows is None else {windows: arguments.windows}
    context = fitting_context(_source(arguments)) if arguments.context is None else arguments.context
    return TextConfig(arguments.text, context=context, bos=arguments.bos, seed=arguments.seed, **counts)


def _dashboard(arguments: argparse.Namespace) -> int:
    from lowrank_core.runs import bundled_path

    app = bundled_path("app.py")
    os.chdir(app.parent)  # Streamlit reads its configuration from the working directory
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(app), "--server.port", str(arguments.port)])


def _handlers() -> dict[str, Callable[[argparse.Namespace], Result]]:
    """Import what needs torch only when a command does: ``--help`` answers at once."""
    from lowrank_core import commands

    return {
        "analyze": lambda a: commands.analyze(_source(a), _text(a)),
        "compress": lambda a: commands.compress_to(_source(a), _text(a), _compress_request(a)),
        "evaluate": lambda a: commands.evaluate_on(_source(a), _text(a, "test_windows"), a.split, a.windows, a.against),
        "search": lambda a: commands.search_in(_source(a), _text(a), _search_config(a), a.run),
        "worker": lambda a: commands.work(a.run, a.warm, keep_paused=a.keep_paused),
        "export": lambda a: commands.export_from(a.run, a.trial, a.out),
        "benchmark": lambda a: commands.benchmark(_source(a), _text(a), a.compression_ratio, seeds=a.seeds, trials=a.trials),
    }


def _compress_request(arguments: argparse.Namespace) -> CompressRequest:
    return CompressRequest(
        compression_ratio=arguments.compression_ratio,
        compression=_compression(arguments),
        allocation=arguments.allocation,
        ranks=arguments.ranks,
        out=arguments.out,
    )


def _compression(arguments: argparse.Namespace) -> CompressionConfig:
    return CompressionConfig(arguments.basis, arguments.storage, value_dense=not arguments.compress_value)


def _search_config(arguments: argparse.Namespace) -> SearchConfig:
    return SearchConfig(
        compression_ratio=arguments.compression_ratio,
        space=arguments.space,
        sampler=arguments.sampler,
        objective=arguments.objective,
        trials=arguments.trials,
        seed=arguments.seed,
        compression=_compression(arguments),
    )


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    return f" Go on with `lowrank worker --run {arguments.run}`." if arguments.command in ("search", "worker") else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "dashboard":
        return _dashboard(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints: stdout carries the result alone
            result = _handlers()[arguments.command](arguments)
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

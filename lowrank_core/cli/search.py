"""``lowrank search``, and what goes on in its run: ``worker`` and ``enqueue``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.cli.options import (
    Command,
    Result,
    calibration_of,
    calibration_options,
    chosen_preset,
    compression_of,
    compression_options,
    json_option,
    model_options,
    source_of,
    text_of,
    text_options,
)
from lowrank_core.config import OBJECTIVES, PRUNERS, SAMPLERS, SPACES, VARIABLES, SearchConfig
from lowrank_core.errors import ConfigError
from lowrank_core.presets.recipes import DEFAULT_PRESET

__all__ = ["add"]

_SEARCH = SearchConfig()
_FIELDS = (
    *("max_ratio", "space", "variables", "error_weights", "sampler", "objective", "trials", "startup_trials"),
    *("pruner", "top_k", "autocast", "confirmed"),
)
"""Fields of ``SearchConfig`` that are options of the same name."""


def add(command: Command) -> None:
    search = command("search", "Search for the ranks that lose least at a compression ratio, then export the best.")
    model_options(search)
    text_options(search)
    calibration_options(search)
    search.add_argument(
        "--compression-ratio", type=float, required=True, metavar="R", help="fraction of the linears' parameters to remove, in (0, 1)"
    )
    compression_options(search, f"{DEFAULT_PRESET.name}, unless you choose basis or storage yourself")
    _search_options(search)
    search.set_defaults(run=run_search)
    _add_worker(command("worker", "Do what is left to do in a run: start, resume, answer the dashboard; or help with its trials."))
    _add_enqueue(command("enqueue", "Queue a manual allocation: the run's worker measures it next."))


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
    parser.add_argument("--ranks", type=Path, metavar="FILE", help="a manual allocation, measured first")
    parser.add_argument("--complete", metavar="A", help="complete a partial --ranks within the budget by an allocation")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: %(default)s)")
    parser.add_argument("--storage-url", metavar="URL", help="keep the study in a database, where workers of other machines join it")
    _run_option(parser, required=True, meaning="new folder for the run")


def _run_option(parser: argparse.ArgumentParser, *, required: bool, meaning: str = "folder of the run") -> None:
    parser.add_argument("--run", required=required, type=Path, metavar="DIR", dest="folder", help=meaning)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    _run_option(parser, required=False)
    parser.add_argument("--warm", type=float, default=0.0, metavar="SECONDS", help="stay and answer requests for so long (default: 0)")
    parser.add_argument("--keep-paused", action="store_true", help="leave a stopped search stopped, and only answer requests")
    parser.add_argument("--more-trials", type=int, metavar="N", help="extend the search by N trials")
    parser.add_argument("--sampler", help=f"go on with another one of {', '.join(SAMPLERS)}")
    parser.add_argument("--join", action="store_true", help="help the worker that holds the run with its trials")
    parser.add_argument("--storage-url", metavar="URL", help="help with a study in a database, from any machine that has the model")
    parser.add_argument("--study", metavar="NAME", help="name of the study there: that of the run's folder")
    parser.add_argument("--model", metavar="M", help="with --storage-url: where the model is on this machine, if elsewhere")
    parser.add_argument("--text", metavar="T", help="with --storage-url: where the text is on this machine, if elsewhere")
    parser.add_argument("--device", help="with --storage-url: auto, cpu, cuda or cuda:N")
    json_option(parser)
    parser.set_defaults(run=run_worker)


def _add_enqueue(parser: argparse.ArgumentParser) -> None:
    _run_option(parser, required=True)
    parser.add_argument("--ranks", required=True, type=Path, metavar="FILE", help="JSON of layer name to rank or null (dense)")
    parser.add_argument("--complete", metavar="A", help=f"complete a partial choice within the budget: {', '.join(ALLOCATORS)}")
    json_option(parser)
    parser.set_defaults(run=run_enqueue)


def run_search(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.search import SearchPlace, search_in

    place = SearchPlace(arguments.folder, arguments.storage_url, arguments.workers, arguments.ranks, arguments.complete)
    return search_in(source_of(arguments), text_of(arguments), calibration_of(arguments), _config(arguments), place)


def _config(arguments: argparse.Namespace) -> SearchConfig:
    preset = chosen_preset(arguments, "basis", "storage", "compress_value")
    given = {name: value for name in _FIELDS if (value := getattr(arguments, name)) is not None}
    return replace(
        _SEARCH,
        compression_ratio=arguments.compression_ratio,
        seed=arguments.seed,
        compression=compression_of(arguments, preset),
        **{**(preset.search if preset else {}), **given},
    )


def run_worker(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands import search as search_commands

    if (arguments.storage_url is None) != (arguments.study is None):
        raise ConfigError("a study in a database has two names: give --storage-url and --study together.")
    if (arguments.folder is None) == (arguments.storage_url is None):
        raise ConfigError("say what to work on: either --run DIR, or --storage-url URL and --study NAME.")
    changes = {name: value for name in ("more_trials", "sampler") if (value := getattr(arguments, name)) is not None}
    if changes and (arguments.join or arguments.storage_url is not None):
        raise ConfigError("--more-trials and --sampler change the search; a worker that joins takes it as it is. Leave them out.")
    if arguments.storage_url is not None:
        where = {"model": arguments.model, "text": arguments.text, "device": arguments.device}
        return search_commands.join_study(arguments.storage_url, arguments.study, arguments.warm, **where)
    if arguments.join:
        return search_commands.join(arguments.folder, arguments.warm)
    return search_commands.work(arguments.folder, arguments.warm, keep_paused=arguments.keep_paused, changes=changes)


def run_enqueue(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.search import enqueue

    return enqueue(arguments.folder, arguments.ranks, arguments.complete)

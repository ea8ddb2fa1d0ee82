"""``lowrank search``, and what goes on in its run: ``worker`` and ``enqueue``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lowrank_core.allocation import RULES, current_name
from lowrank_core.cli import options
from lowrank_core.cli.options import Command
from lowrank_core.config import SAMPLERS, CalibrationConfig, SearchConfig
from lowrank_core.errors import ConfigError
from lowrank_core.presets.recipes import DEFAULT_PRESET, PRESETS
from lowrank_core.types import Result

__all__ = ["add"]

_USUAL = {name: getattr(SearchConfig(), name) for preset in PRESETS.values() for name in preset.search}
"""Of what some preset decides, the default: a preset on the command line takes the place of the recipe in the file of ``--config``."""


def add(command: Command) -> None:
    search = command("search", "Search for the ranks of minimum loss at a compression ratio, then export the best.", run_search)
    options.model_options(search)
    options.text_options(search)
    options.add_options(search, CalibrationConfig)
    options.compression_options(search, f"{DEFAULT_PRESET.name}, unless you choose metric or storage yourself")
    options.add_options(search, SearchConfig)
    _place_options(search)
    _add_worker(command("worker", "Start or resume a run's worker, or join its search.", run_worker))
    _add_enqueue(command("enqueue", "Queue a manual allocation: the run's worker measures it next.", run_enqueue))


def _place_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=Path, metavar="FILE", help="a manual allocation, measured first")
    parser.add_argument("--complete", metavar="A", type=current_name, help="complete a partial --ranks within the budget by an allocation")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default: %(default)s)")
    parser.add_argument("--storage-url", metavar="URL", help="keep the study in a database, where workers of other machines join it")
    _run_option(parser, required=False, meaning="new folder for the run")
    options.estimate_option(parser)


def _run_option(parser: argparse.ArgumentParser, *, required: bool, meaning: str = "folder of the run") -> None:
    parser.add_argument("--run", required=required, type=Path, metavar="DIR", dest="folder", help=meaning)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    _run_option(parser, required=False)
    parser.add_argument("--warm", type=float, default=0.0, metavar="SECONDS", help="seconds to stay for requests when done (default: 0)")
    parser.add_argument("--keep-paused", action="store_true", help="handle requests without resuming a stopped search")
    parser.add_argument("--more-trials", type=int, metavar="N", help="extend the search by N trials")
    parser.add_argument("--sampler", help=f"go on with another one of {', '.join(SAMPLERS)}")
    parser.add_argument("--join", action="store_true", help="join the run's worker and share its trials")
    parser.add_argument("--storage-url", metavar="URL", help="join a study in a database, from any machine that has the model")
    parser.add_argument("--study", metavar="NAME", help="name of the study there: that of the run's folder")
    parser.add_argument("--model", metavar="M", help="with --storage-url: where the model is on this machine, if elsewhere")
    parser.add_argument("--text", metavar="T", help="with --storage-url: where the text is on this machine, if elsewhere")
    parser.add_argument("--device", help="with --storage-url: auto, cpu, cuda or cuda:N")


def _add_enqueue(parser: argparse.ArgumentParser) -> None:
    _run_option(parser, required=True)
    parser.add_argument("--ranks", required=True, type=Path, metavar="FILE", help="JSON of layer name to rank or null (dense)")
    parser.add_argument(
        "--complete", metavar="A", type=current_name, help=f"complete a partial choice within the budget: {', '.join(RULES)}"
    )


def run_search(arguments: argparse.Namespace) -> Result:
    if arguments.folder is None and not arguments.estimate:
        raise ConfigError("which run? Give --run DIR, a new folder, or --estimate to know beforehand how long it takes.")
    from lowrank_core.commands.search import SearchPlace, estimate, search_in
    from lowrank_core.studio.shared.protocol import trial_protocol

    if arguments.estimate:
        calibration = options.config_of(arguments, CalibrationConfig)
        return estimate(options.source_of(arguments), options.text_of(arguments), calibration, _config(arguments))
    place = SearchPlace(arguments.folder, arguments.storage_url, arguments.workers, arguments.ranks, arguments.complete)
    calibration = options.config_of(arguments, CalibrationConfig)
    return search_in(options.source_of(arguments), options.text_of(arguments), calibration, _config(arguments), place, trial_protocol)


def _config(arguments: argparse.Namespace) -> SearchConfig:
    preset = options.chosen_preset(arguments)
    base, given = options.recorded(arguments, SearchConfig), options.given_options(arguments, SearchConfig)
    if base is None and "compression_ratio" not in given:
        raise ConfigError("how much to remove? Give --compression-ratio, such as 0.2, or --config FILE.")
    base = base or replace(SearchConfig(), seed=options.text_of(arguments).seed)
    recipe = {} if preset is None else {**_USUAL, **preset.search}
    return replace(base, **{**recipe, **given}, compression=options.factors_of(arguments, preset))


def run_worker(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands import search as search_commands
    from lowrank_core.runs import open_run
    from lowrank_core.worker.joining import run_of_study

    if (arguments.storage_url is None) != (arguments.study is None):
        raise ConfigError("a study in a database has two names: give --storage-url and --study together.")
    if (arguments.folder is None) == (arguments.storage_url is None):
        raise ConfigError("which run? Give either --run DIR, or --storage-url URL and --study NAME.")
    changes = {name: value for name in ("more_trials", "sampler") if (value := getattr(arguments, name)) is not None}
    if changes and (arguments.join or arguments.storage_url is not None):
        raise ConfigError("--more-trials and --sampler change the search; a worker that joins takes it as it is. Leave them out.")
    if arguments.storage_url is not None:
        where = {"model": arguments.model, "text": arguments.text, "device": arguments.device}
        return search_commands.join(run_of_study(arguments.storage_url, arguments.study, **where), arguments.warm)
    if arguments.join:
        return search_commands.join(open_run(arguments.folder), arguments.warm)
    return search_commands.work(arguments.folder, arguments.warm, keep_paused=arguments.keep_paused, changes=changes)


def run_enqueue(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.search import enqueue
    from lowrank_core.studio.shared.model_facts import units_of

    return enqueue(arguments.folder, arguments.ranks, arguments.complete, units_of)

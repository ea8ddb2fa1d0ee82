"""``lowrank compress``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.allocation import ALLOCATORS, current_name
from lowrank_core.cli import options
from lowrank_core.cli.options import Command
from lowrank_core.config import CalibrationConfig, CompressRequest, ExportConfig, SearchConfig
from lowrank_core.errors import ConfigError
from lowrank_core.presets.recipes import DEFAULT_PRESET
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("compress", "Compress a model at a ratio (or at given ranks) and write it as a folder.", run)
    options.model_options(parser)
    options.text_options(parser)
    options.add_options(parser, CalibrationConfig)
    options.add_options(parser, SearchConfig, only=("compression_ratio", "error_weights", "deep_weights"))
    options.compression_options(parser, f"{DEFAULT_PRESET.name}, unless you choose basis, storage or allocation yourself")
    parser.add_argument(
        "--allocation",
        metavar="A",
        type=current_name,
        help=f"one of {', '.join(ALLOCATORS)} (default: the preset's; else that of the search in --config, or uniform)",
    )
    parser.add_argument(
        "--budget",
        default="parameters",
        metavar="B",
        help="what the ratio is a fraction of: parameters; bytes: of those in 16 bits, and each layer, with factors or dense, gets a grid, "
        "too: floats, int8 or int4 (default: %(default)s)",
    )
    parser.add_argument("--tune", action="store_true", help="choose the gradient damping and a drift-aware basis's β on validation text")
    parser.add_argument(
        "--ranks",
        metavar="FILE",
        help="JSON of layer name to rank or null (dense), or a config of LEMS, ASVD or LowRankArena; instead of an allocation",
    )
    parser.add_argument(
        "--complete", metavar="A", type=current_name, help="keep the locked ranks of the file, and spend the rest of the budget by A"
    )
    options.estimate_option(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the compressed model")
    options.add_options(parser, ExportConfig)


def run(arguments: argparse.Namespace) -> Result:
    if arguments.out is None and not arguments.estimate:
        raise ConfigError("where to? Give --out DIR, or --estimate to know beforehand how long it takes.")
    from lowrank_core.commands.compress import compress_to, estimate

    return (estimate if arguments.estimate else compress_to)(options.source_of(arguments), options.text_of(arguments), _request(arguments))


def _request(arguments: argparse.Namespace) -> CompressRequest:
    preset = options.chosen_preset(arguments, "allocation")
    given, base = options.given_options(arguments, SearchConfig), options.recorded(arguments, SearchConfig)
    return CompressRequest(
        compression_ratio=given.get("compression_ratio", base.compression_ratio if base else None),
        preset=preset.name if preset else "",
        tune=arguments.tune,
        calibration=options.config_of(arguments, CalibrationConfig),
        compression=options.factors_of(arguments, preset),
        allocation=arguments.allocation or (preset.allocation if preset else _searched(base)),
        ranks=arguments.ranks,
        out=arguments.out or Path(),
        complete=arguments.complete,
        error_weights=bool(given.get("error_weights", base.error_weights if base else False)),
        deep_weights=bool(given.get("deep_weights", base.deep_weights if base else False)),
        export=options.config_of(arguments, ExportConfig),
        command=arguments.line,
        budget=arguments.budget,
    )


def _searched(search: SearchConfig | None) -> str:
    """Return the allocator around which ``search`` looks."""
    return "lagrangian" if search is not None and search.variables == "error_weight" else "uniform"

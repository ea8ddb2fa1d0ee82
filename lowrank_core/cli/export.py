"""``lowrank export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_core.cli.options import Command, add_options, config_of, file_option
from lowrank_core.config import ExportConfig
from lowrank_core.errors import ConfigError
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("export", "Export the compressed model of a trial, or convert an export of ours or of another project.", run)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", dest="folder", help="folder of the run")
    source.add_argument(
        "--from",
        type=Path,
        metavar="DIR",
        dest="source",
        help="an export: with --form plain or dense, to write in that form; of an earlier version, to convert with unchanged weights; "
        "or factors as LEMS, ASVD or LowRankArena write them, to export as ours",
    )
    parser.add_argument("--trial", default="best", help="best or a trial's number (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder for the compressed model")
    add_options(parser, ExportConfig, aliases={"dtype": "--dtype"})
    file_option(parser)


def run(arguments: argparse.Namespace) -> Result:
    config = config_of(arguments, ExportConfig)  # a bad choice is reported before torch is loaded
    config.check_rounding()
    if arguments.source is not None:
        return _rewritten(arguments, config)
    from lowrank_core.commands.search import export_from

    return export_from(arguments.folder, arguments.trial, arguments.out, config, command=arguments.line)


def _rewritten(arguments: argparse.Namespace, config: ExportConfig) -> Result:
    """Rewrite an older export, or any in another form; or write what another project compressed in ours.

    Raises:
        ConfigError: a choice of how to write it, which is not taken here.
        ModelError: as ``convert`` and ``rewrite``.
    """
    from lowrank_core.models.foreign import foreign_folder

    if config.form != "compressed" or foreign_folder(str(arguments.source)) is not None:
        from lowrank_core.export import convert
        from lowrank_core.export.card import written_words

        manifest = convert(arguments.source, arguments.out, config)
        return {**manifest.to_mapping(), "out": str(arguments.out), "text": f"Wrote {arguments.out}: {written_words(manifest)}"}
    if config != ExportConfig() or arguments.trial != "best":
        raise ConfigError(
            "--from converts an export with unchanged weights; leave --trial, --dtype, --quantize, --with-code and --max-shard-size out, "
            "or write another form (--form plain or dense)."
        )
    from lowrank_core.export import rewrite

    result = rewrite(arguments.source, arguments.out)
    left = f" Not copied, as nothing loads them: {', '.join(result.left)}." if result.left else ""
    return {
        "out": str(arguments.out),
        "guards": result.guards,
        "not_copied": list(result.left),
        "text": f"Wrote {arguments.out}: the tensors of {arguments.source} bit for bit, and {result.guards} guards: where lowrank_core is "
        f"not imported, transformers now refuses it.{left}",
    }

"""``lowrank``: parse, call, print. Exit status 0; 2 for bad input (one line on stderr); 1 for a failure.

A command is a module here: ``add`` declares it, and what it runs imports torch only then, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from lowrank_core import __version__
from lowrank_core.cli import (
    analyze,
    benchmark,
    compress,
    evaluate,
    export,
    generate,
    heal,
    report,
    search,
    sensitivity,
    serve,
    speed,
    studio,
    tasks,
    verify,
)
from lowrank_core.cli.options import Parser, check_file, json_option
from lowrank_core.errors import Cancelled, LowRankError, NumericalError
from lowrank_core.runs.processes import return_freed_arrays
from lowrank_core.types import Result

__all__ = ["main", "parser"]

COMMANDS = (
    analyze,
    compress,
    evaluate,
    generate,
    tasks,
    speed,
    search,
    sensitivity,
    heal,
    export,
    verify,
    serve,
    report,
    studio,
    benchmark,
)
"""In the order of ``--help``."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each leaves in ``run`` what it does."""
    result = Parser(prog="lowrank", description="Analyse, search and compress the low-rank structure of a causal language model.")
    result.add_argument("--version", action="version", version=f"lowrank {__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, summary: str, run: Callable[[argparse.Namespace], Result] | None = None) -> Parser:
        added = commands.add_parser(name, help=summary, description=summary)
        if run is not None:
            added.set_defaults(run=run)
            json_option(added)
        return added

    for module in COMMANDS:
        module.add(command)
    return result


_CALIBRATING = ("analyze", "compress")
"""Commands that several processes may calibrate for."""


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if arguments.command == "sensitivity" and arguments.folder is not None:
        return f" Go on with `lowrank sensitivity --run {arguments.folder}`: what is measured is kept."
    return f" Go on with `lowrank worker --run {arguments.folder}`." if arguments.command in ("search", "worker") else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # Idle threads that spin starve the busy ones as soon as anything else runs on the machine; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return_freed_arrays()
    arguments = parser().parse_args(argv)
    with _calibrating_together(arguments):
        return _run(arguments, argv)


@contextlib.contextmanager
def _calibrating_together(arguments: argparse.Namespace) -> Iterator[None]:
    """Join the processes that ``torchrun`` started; all but the first end, without a word, when the statistics are there."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if arguments.command not in _CALIBRATING:
        raise SystemExit(f"lowrank: {arguments.command} runs in one process. Only {' and '.join(_CALIBRATING)} can be started by torchrun.")
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        with contextlib.nullcontext() if dist.get_rank() == 0 else contextlib.redirect_stderr(io.StringIO()):
            yield
    except RuntimeError:
        if dist.get_rank():
            raise SystemExit(1) from None  # the first process has said why it ended
        raise
    finally:
        dist.destroy_process_group()


def _run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    arguments.line = shlex.join(["lowrank", *(sys.argv[1:] if argv is None else argv)])  # for the card of what is made
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints: stdout carries the result alone
            check_file(arguments)
            result = arguments.run(arguments)
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
    return 0 if result.get("ok", True) else 1

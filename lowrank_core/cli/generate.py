"""``lowrank generate``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, json_option, model_options, source_of
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("generate", "Continue a prompt, optionally next to the dense model.")
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, continuing the same prompt")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="maximum number of new tokens (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="sampling temperature; 0 is greedy (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of sampling (default: 0)")
    json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.evaluate import continue_with
    from lowrank_core.evaluation.generation import Sampling

    sampling = Sampling(arguments.tokens, arguments.temperature, arguments.seed)
    return continue_with(source_of(arguments), arguments.prompt, sampling, arguments.against)

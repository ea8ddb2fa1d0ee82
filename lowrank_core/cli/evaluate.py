"""``lowrank evaluate``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, given_options, model_options, source_of, text_of, text_options
from lowrank_core.config import TextConfig
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("evaluate", "Measure perplexity and KL to the dense model on one text or several.")
    model_options(parser)
    text_options(parser, "test_windows", several=True)
    parser.add_argument("--split", choices=("validation", "test", "all"), default="test", help="part of the text (default: %(default)s)")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window to the next, each token predicted once (default: no overlap)"
    )
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, to compare with on the same windows")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.evaluate import EvaluationRequest, evaluate_on, evaluate_on_texts

    references = arguments.text or [None]
    texts = [text_of(arguments, reference=reference) for reference in references]
    windows = given_options(arguments, TextConfig).get("test_windows")
    request = EvaluationRequest(arguments.split, windows, arguments.stride, arguments.against)
    if len(texts) == 1:
        return evaluate_on(source_of(arguments), texts[0], request)
    return evaluate_on_texts(source_of(arguments), texts, request)

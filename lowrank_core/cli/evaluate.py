"""``lowrank evaluate``."""

from __future__ import annotations

import argparse

from lowrank_core.cli.options import Command, add_options, config_of, given_options, model_options, source_of, text_of, text_options
from lowrank_core.config import TextConfig
from lowrank_core.config.evaluation import BehaviourConfig, EvaluationConfig
from lowrank_core.errors import ConfigError
from lowrank_core.types import Result

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("evaluate", "Measure perplexity and KL to the dense model on one text or several.", run)
    model_options(parser)
    text_options(parser, "test_windows", several=True)
    add_options(parser, EvaluationConfig, without=("windows",))
    add_options(parser, BehaviourConfig)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, to compare with on the same windows")


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.commands.evaluate import evaluate_on, evaluate_on_texts

    texts = [text_of(arguments, reference=reference) for reference in arguments.text or [None]]
    windows = given_options(arguments, TextConfig).get("test_windows")
    config = config_of(arguments, EvaluationConfig, **({} if windows is None else {"windows": windows}))
    if given_options(arguments, BehaviourConfig) and not config.behaviour:
        raise ConfigError("prompts and new tokens are those of --behaviour: add it, or leave them out.")
    behaviour = config_of(arguments, BehaviourConfig) if config.behaviour else None
    if len(texts) == 1:
        return evaluate_on(source_of(arguments), texts[0], config, arguments.against, behaviour)
    return evaluate_on_texts(source_of(arguments), texts, config, arguments.against, behaviour)

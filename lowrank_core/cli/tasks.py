"""``lowrank tasks``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from lowrank_core.cli.options import Command, add_options, config_of, given_options, model_options, source_of
from lowrank_core.cli.tables import aligned
from lowrank_core.config import to_mapping
from lowrank_core.config.evaluation import TasksConfig
from lowrank_core.studio.shared.formatting import DASH
from lowrank_core.types import Result
from lowrank_core.wording import fixed

if TYPE_CHECKING:
    from lowrank_core.tasks import TaskScore, TasksReport

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("tasks", "Run zero-shot and few-shot tasks through lm-eval, dense next to compressed.", run)
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, on the same tasks")
    add_options(parser, TasksConfig)


def run(arguments: argparse.Namespace) -> Result:
    own = given_options(arguments, TasksConfig).get("include_path")  # its code is run: never by a file of --config, which may be another's
    config, source = config_of(arguments, TasksConfig, include_path=own), source_of(arguments)
    from lowrank_core.models import load_model
    from lowrank_core.tasks import run_tasks
    from lowrank_core.tasks.harness import Harness

    harness = Harness(config)  # unknown tasks are reported before a model is loaded
    against = None if arguments.against is None else load_model(replace(source, reference=arguments.against))
    report = run_tasks(load_model(source), config, against=against, harness=harness)
    return {**to_mapping(report), "text": _text(report)}


def _text(report: TasksReport) -> str:
    alongside = report.against is not None
    headings = ["task", "metric", "documents", "shots", "version", *(["dense", "compressed", "difference"] if alongside else ["score"])]
    lines = [aligned([headings, *(_cells(score, alongside=alongside) for score in report.scores)], left=2), report.protocol]
    if alongside:
        lines.append("± is one standard error; that of a difference is paired over documents.")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report.warnings)])


def _cells(score: TaskScore, *, alongside: bool) -> list[str]:
    metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    shots = DASH if score.few_shot is None else str(score.few_shot)
    first = [score.task, metric, f"{score.documents:,}", shots, score.version or DASH]
    ours = _measured(score.value, score.stderr)
    if not alongside:
        return [*first, ours]
    return [*first, _measured(score.dense, score.dense_stderr), ours, _measured(score.difference, score.difference_stderr, sign="+")]


def _measured(value: float | None, stderr: float | None, sign: str = "") -> str:
    if value is None:
        return DASH
    words = fixed(value, 4, signed=bool(sign))
    return words if stderr is None else f"{words} ± {stderr:.4f}"

"""``lowrank tasks``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_core.cli.options import Command, json_option, model_options, source_of
from lowrank_core.cli.tables import aligned
from lowrank_core.config import to_mapping
from lowrank_core.studio.shared.formatting import DASH
from lowrank_core.types import Result
from lowrank_core.wording import fixed

if TYPE_CHECKING:
    from lowrank_core.tasks import TaskScore, TasksReport

__all__ = ["add"]


def add(command: Command) -> None:
    parser = command("tasks", "Run zero-shot and few-shot tasks through lm-eval, dense next to compressed.")
    model_options(parser)
    parser.add_argument("--against", metavar="DENSE_MODEL", help="the dense model, on the same tasks")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="NAME", help="tasks, groups or patterns (arc_easy, 'mmlu_*')")
    own = "folder with .yaml task files of your own; Python functions that they name are run"
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help=own)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="sequences in a forward pass (default: %(default)s)")
    parser.add_argument("--few-shot", type=int, metavar="K", help="few-shot examples (default: the task's own number)")
    json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Result:
    from lowrank_core.models import load_model
    from lowrank_core.tasks import TasksConfig, run_tasks
    from lowrank_core.tasks.harness import Harness

    a = arguments
    config = TasksConfig(tuple(a.tasks), a.include_path, a.limit, a.batch_size, a.few_shot)
    harness = Harness(config)  # unknown tasks are reported before a model is loaded
    source = source_of(a)
    against = None if a.against is None else load_model(replace(source, reference=a.against))
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

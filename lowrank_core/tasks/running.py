"""From the answers of one or two models to scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lowrank_core.config.evaluation import TasksConfig
from lowrank_core.errors import NumericalError
from lowrank_core.models import ModelHandle
from lowrank_core.tasks.harness import Answers, Harness
from lowrank_core.tasks.records import TaskScore, TasksReport

__all__ = ["run_tasks"]

_SAME_MEAN = 1e-9
"""By how much a score may differ from the mean of its documents and still be that mean; rounding alone."""


def run_tasks(
    handle: ModelHandle, config: TasksConfig, *, against: ModelHandle | None = None, harness: Harness | None = None
) -> TasksReport:
    """Run tasks on a model, and on the dense one ``against`` which it is compared with.

    Args:
        harness: of ``config``, if it was made before; reading what tasks there are can take seconds.

    Raises:
        ConfigError: lm-eval is not installed, a task is not known, or its data can't be had.
        ModelError: the model can't answer what a task asks.
        NumericalError: a score is not finite.
    """
    harness = harness or Harness(config)
    ours = harness.answers(handle)
    scores, warnings = tuple(_scores(ours)), ours.warnings
    if against is not None:
        dense = harness.answers(against)
        scores = tuple(_beside(scores, ours, dense))
        warnings = tuple(dict.fromkeys((*warnings, *dense.warnings)))
    reference = None if against is None else against.reference
    return TasksReport(handle.reference, reference, scores, warnings, _protocol(handle, config, harness.version))


def _scores(answers: Answers) -> Iterator[TaskScore]:
    results = answers.results
    for task, result in results["results"].items():
        for key, value in result.items():
            metric, comma, applied = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            few_shot = results["n-shot"].get(task)
            yield TaskScore(
                task=task,
                metric=metric,
                filter=applied,
                value=_finite(value, f"{task}: {metric}"),
                stderr=_number(result.get(f"{metric}_stderr,{applied}")),
                documents=int(result["sample_len"]),
                version=str(results["versions"].get(task, "")),
                few_shot=few_shot if isinstance(few_shot, int) else None,
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
            )


def _beside(scores: tuple[TaskScore, ...], ours: Answers, dense: Answers) -> Iterator[TaskScore]:
    """Yield the scores with those of the dense model, and what they differ by."""
    theirs = {(score.task, score.metric, score.filter): score for score in _scores(dense)}
    for score in scores:
        other = theirs[score.task, score.metric, score.filter]
        yield replace(
            score,
            dense=other.value,
            dense_stderr=other.stderr,
            difference=score.value - other.value,
            difference_stderr=_paired_stderr(_by_document(ours, score), _by_document(dense, other), score.value, other.value),
        )


def _by_document(answers: Answers, score: TaskScore) -> dict[object, float | None]:
    """Return document -> its own score; empty for a group."""
    samples = answers.results["samples"].get(score.task, ())
    return {sample["doc_id"]: _number(sample.get(score.metric)) for sample in samples if sample["filter"] == score.filter}


def _paired_stderr(ours: Mapping[object, float | None], theirs: Mapping[object, float | None], value: float, other: float) -> float | None:
    """Return s / √n, where s is the standard deviation of the n differences; None where the scores are no means over documents."""
    pairs = [(ours[document], theirs.get(document)) for document in ours]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < 2 or len(known) != len(pairs) or len(ours) != len(theirs):
        return None
    means = (statistics.fmean(a for a, _ in known), statistics.fmean(b for _, b in known))
    if not all(
        math.isclose(mean, score, rel_tol=_SAME_MEAN, abs_tol=_SAME_MEAN) for mean, score in zip(means, (value, other), strict=True)
    ):
        return None
    return statistics.stdev(a - b for a, b in known) / math.sqrt(len(known))


def _number(value: Any) -> float | None:
    """Return a finite number, or None for what lm-eval has instead (``N/A``, NaN, a tuple)."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def _finite(value: Any, name: str) -> float:
    result = _number(value)
    if result is None:
        raise NumericalError(f"tasks: {name} is {value!r}, no finite number. The model may have diverged: evaluate its perplexity first.")
    return result


def _protocol(handle: ModelHandle, config: TasksConfig, version: str) -> str:
    documents = "all documents" if config.limit is None else f"the first {config.limit} documents of each task"
    dtype = handle.dtype
    return f"lm-eval {version}, {documents}, batch {config.batch_size}, {dtype}, {handle.device.type}, seed {config.seed}"

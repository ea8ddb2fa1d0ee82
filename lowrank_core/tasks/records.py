"""Results of tasks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TaskScore", "TasksReport"]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        metric, filter: of lm-eval; the filter says what was made of the answer before it was judged.
        value: of the model, with its standard error over documents where the task tells one.
        documents: how many were asked.
        version: of the task; scores of different versions can't be compared.
        few_shot: few-shot examples; None for a group whose tasks differ.
        higher_is_better: None where the task does not say.
        dense, dense_stderr: of the dense model, if there is one.
        difference: compressed minus dense.
        difference_stderr: standard error of the mean of the differences of single documents: it is smaller than that of two independent
            scores, because both models were asked the same. None where the metric is no mean over documents.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    documents: int
    version: str
    few_shot: int | None
    higher_is_better: bool | None
    dense: float | None = None
    dense_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


@dataclass(frozen=True)
class TasksReport:
    """Results of tasks.

    Attributes:
        scores: in the order of lm-eval.
        warnings: what lm-eval had to say while it ran, such as questions that were cut to the model's context.
        protocol: how the scores were measured.
    """

    model: str
    against: str | None
    scores: tuple[TaskScore, ...]
    warnings: tuple[str, ...]
    protocol: str

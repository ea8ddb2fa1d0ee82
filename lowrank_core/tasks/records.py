"""Settings and results of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowrank_core.errors import ConfigError

__all__ = ["TaskScore", "TasksConfig", "TasksReport"]


@dataclass(frozen=True)
class TasksConfig:
    """Tasks and number of documents.

    Attributes:
        tasks: names of tasks, groups or tags of lm-eval, or patterns of them (``mmlu_*``).
        include_path: folder with task files (.yaml) of one's own, which come before those of lm-eval. A task file can name Python
            functions of its folder, and these are run: give only folders that you trust.
        limit: documents of each task, the first ones; None takes all.
        batch_size: sequences in a forward pass.
        few_shot: few-shot examples; None leaves it to the task.
        seed: of the draw of these examples, and of generation where a task samples.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    few_shot: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks: name at least one, such as arc_easy, or one of a folder given with --include-path.")
        for name, value, minimum in (
            ("limit", self.limit, 1),
            ("batch size", self.batch_size, 1),
            ("few-shot", self.few_shot, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < minimum:
                raise ConfigError(f"{name} must be at least {minimum}, got {value}.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--include-path: there is no folder {self.include_path}. Give the folder that holds the task's .yaml file.")


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

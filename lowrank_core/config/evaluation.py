"""Settings of evaluations: perplexity, continuations, and tasks of lm-eval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lowrank_core.config.checks import Continued
from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["BehaviourConfig", "EvaluationConfig", "Sampling", "TasksConfig"]


@dataclass(frozen=True)
class EvaluationConfig:
    """Part of a text that a model is measured on.

    Attributes:
        windows: at most, spread over the split; None: the text's number of test windows, or every one of ``all``.
    """

    split: str = option("test", "part of the text", choices=("calibration", "validation", "test", "all"))
    windows: int | None = option(None, "at most, spread over the split", minimum=1, fallback="those of the text")
    stride: int | None = option(
        None, "tokens from one window to the next, each token predicted once", fallback="the context: windows do not overlap"
    )
    behaviour: bool = option(
        False, "continue the beginnings of windows, too, and report repeated 4-grams, endings and length, next to the dense model's"
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class BehaviourConfig(Continued):
    """Greedy continuations that tell how a model behaves."""

    prompts: int = option(32, "windows whose first tokens are continued, spread over the text", label="Prompts", minimum=1)
    prompt_tokens: int = option(32, "tokens of each prompt", label="Prompt tokens", minimum=1)
    new_tokens: int = option(128, "new ones of each, at most; an end token ends it before", label="New tokens, at most", minimum=4)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Sampling:
    """Sampling of a continuation."""

    tokens: int = option(64, "new ones, at most; the end of a text ends it", minimum=1)
    temperature: float = option(0.0, "of the softmax that one of the 50 likeliest tokens is drawn by; 0 takes the likeliest")
    seed: int = option(0, "of the draws")

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be a number from 0 (the likeliest token) up, got {self.temperature:g}. Try 0.7.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed}.")


@dataclass(frozen=True)
class TasksConfig:
    """Tasks of lm-eval, and how many documents of each."""

    tasks: tuple[str, ...] = option((), "tasks, groups or patterns (arc_easy, 'mmlu_*')", fallback="none: give some")
    include_path: str | None = option(
        None, "folder with .yaml task files of your own, which come first; Python functions that they name are run", fallback="none"
    )
    limit: int | None = option(None, "the first so many documents of each task", minimum=1, fallback="all")
    batch_size: int = option(8, "sequences in a forward pass", minimum=1)
    few_shot: int | None = option(None, "few-shot examples", minimum=0, fallback="the task's own number")
    seed: int = option(1234, "of the draw of these examples, and of generation where a task samples", flag="tasks-seed", minimum=0)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks: name at least one, such as arc_easy, or one of a folder given with --include-path.")
        check_options(self)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"--include-path: there is no folder {self.include_path}. Give the folder that holds the task's .yaml file.")

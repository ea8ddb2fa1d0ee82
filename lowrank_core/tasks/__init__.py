"""Zero-shot and few-shot tasks through lm-eval, the dense model next to the compressed one on the same documents."""

from lowrank_core.config.evaluation import TasksConfig
from lowrank_core.tasks.records import TaskScore, TasksReport
from lowrank_core.tasks.running import run_tasks

__all__ = ["TaskScore", "TasksConfig", "TasksReport", "run_tasks"]

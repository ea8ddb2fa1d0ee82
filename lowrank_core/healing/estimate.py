"""Seconds of a healing before it starts, from timed steps and a timed validation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from lowrank_core.config.healing import HealingConfig
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.healing.rates import VALIDATIONS
from lowrank_core.healing.trainer import heal
from lowrank_core.models.handle import ModelHandle
from lowrank_core.runs.stage_times import PieceTimer, StageTime
from lowrank_core.text import WindowSet

__all__ = ["healing_times"]

_STEPS, _WINDOWS = (1, 3), 2
"""Steps of the timed pieces, and the windows that these validate on."""
_TINY_RATE = 1e-9


def healing_times(
    models: tuple[ModelHandle, ModelHandle],
    texts: tuple[WindowSet, WindowSet],
    config: HealingConfig,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[StageTime, ...]:
    """Return the seconds of all steps, at most, and of the validations around and between them.

    Args:
        models: the compressed and the dense one.
        texts: windows to train on, and windows to validate on.

    Raises:
        LowRankError: as ``heal``.
    """
    (compressed, dense), (training, validation), timer = models, texts, PieceTimer(clock)
    quick = replace(config, learning_rate=_TINY_RATE, validate_every=config.steps + 1)
    few = validation.first(_WINDOWS)
    _, step = timer.line(lambda steps: heal(compressed, dense, (training, few), replace(quick, steps=steps)), _STEPS, config.steps)
    reference = DenseReference.compute(dense, validation, batch_size=config.batch_size)
    one = timer.once(lambda: score_windows(compressed, validation, batch_size=config.batch_size, dense=reference))
    around = 3  # of the dense model, of the start, and of the end
    rounds = around + -(-config.steps // config.validate_every) + (VALIDATIONS if config.learning_rate is None else 0)
    return (
        StageTime("Steps, at most", step * config.steps, "timed pieces"),
        StageTime("Validations", rounds * one, "timed once"),
    )

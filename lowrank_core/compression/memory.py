"""Memory that each stage of a compression takes, before it is begun: what a budget of memory is held against.

Notation::

    n, m    inputs and outputs of a matrix;  V tokens that the model knows;  T tokens in a window;  B windows in a pass;  N windows in all
    d       width of the hidden states;  p inputs and outputs of a block's matrices together

The counts of matrices are what was seen at most on random Llamas of widths from 512 to 1024, not a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil

from lowrank_core.config import CALIBRATION_MATRICES, CalibrationConfig, CompressionConfig, TextConfig
from lowrank_core.errors import ModelError
from lowrank_core.metrics import metric_named
from lowrank_core.models.handle import ModelHandle
from lowrank_core.wording import amount

__all__ = ["MemoryNeed", "check_memory", "memory_needed"]

_FLOAT32, _FLOAT64 = 4, 8
_LIBRARIES = 100 * 2**20
"""Memory of torch, the text and small tensors once work has begun, on top of what the process has when the model is loaded."""

_FACTORISING, _FITTING = 16, 14
"""Float64 matrices of the widest input."""

_LOGITS, _ACTIVATIONS = 4, 3
"""Copies of the logits of a pass, and of what a block's matrices read and give in one."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that stages take on top of those that the process has now; each leaves its memory to the next one."""

    now: int
    stages: Mapping[str, int]

    @property
    def most(self) -> str:
        """The stage that takes most."""
        return max(self.stages, key=self.stages.__getitem__)

    @property
    def total(self) -> int:
        """Largest memory of the process."""
        return self.now + self.stages[self.most]


def memory_needed(handle: ModelHandle, text: TextConfig, calibration: CalibrationConfig, compression: CompressionConfig) -> MemoryNeed:
    """Return what a compression of a loaded model takes, on the CPU."""
    basis, shapes = metric_named(compression.basis), handle.shapes
    inputs: dict[int, dict[str, int]] = {}
    outputs, passing = dict[int, int](), dict[int, int]()
    for shape in shapes:
        inputs.setdefault(shape.depth, {})[shape.input_group] = shape.d_in
        outputs[shape.depth] = outputs.get(shape.depth, 0) + shape.d_out**2
        passing[shape.depth] = passing.get(shape.depth, 0) + shape.d_in + shape.d_out
    widest = _FLOAT64 * max(shape.d_in for shape in shapes) ** 2
    batch = calibration.batch_size * text.context
    activations = _ACTIVATIONS * batch * max(passing.values()) * _FLOAT32
    logits = _LOGITS * batch * handle.vocabulary * _FLOAT32
    squares = max(sum(n * n for n in groups.values()) for groups in inputs.values())
    stages = {
        "Calibrating": CALIBRATION_MATRICES * _FLOAT64 * squares + activations,
        "Factorising": _FACTORISING * widest,
        "Writing and measuring": logits,
    }
    if basis.needs_gradients:
        states = min(calibration.gradient_windows, text.calibration_windows) * text.context * handle.width * _FLOAT32
        stages["Measuring gradients"] = _FLOAT64 * max(outputs.values()) + 2 * activations + states + logits
    if basis.sequential:
        fitted = min(compression.fit_windows, text.calibration_windows) * text.context * handle.width * _FLOAT32
        stages["Compressing"] = _FITTING * widest + activations + (2 * fitted if handle.weights is None else 0)
    copied = 0 if handle.weights is not None else handle.linear_parameters * handle.module.dtype.itemsize  # the compressed layers
    late = ("Compressing", "Writing and measuring")
    stages = {name: _LIBRARIES + size + (copied if name in late else 0) for name, size in stages.items()}
    return MemoryNeed(_own_memory(), stages)


def _own_memory() -> int:
    """Return what this process has, without what is mapped from files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def check_memory(
    handle: ModelHandle, text: TextConfig, calibration: CalibrationConfig, compression: CompressionConfig, budget: int | None
) -> None:
    """Refuse, before work is spent, what can't be done within ``budget`` bytes; None refuses nothing.

    Raises:
        ModelError: it needs more; says which stage, how much, and what would fit.
    """
    if budget is None or handle.device.type != "cpu":
        return
    need = memory_needed(handle, text, calibration, compression)
    if need.total <= budget:
        return
    least = memory_needed(handle, text, replace(calibration, batch_size=1), compression)
    advice = "Lower --batch-size to 1" if least.total <= budget else f"Give --memory {_rounded_up(need.total)}"
    raise ModelError(
        f"memory: {need.most} takes about {amount(need.total)} on {handle.reference}, {amount(need.now)} of which are taken already, and "
        f"--memory allows {amount(budget)}. {advice}, or choose a smaller model."
    )


def _rounded_up(size: int) -> str:
    """Return a size as ``--memory`` takes it, not less than ``size``."""
    return f"{-(-size // 10**8) / 10:.1f}GB"

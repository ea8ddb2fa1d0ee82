"""Estimate of the memory and disk that a calibration needs, against those free on this machine.

Notation::

    n      width of a distinct input (q, k and v share theirs);  T tokens in a window;  d hidden width
    b      bytes of a weight as it is held: 4 on a CPU unless another dtype is chosen, else those of the checkpoint
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import pandas as pd
import psutil

from lowrank_core.config import CALIBRATION_MATRICES, WORKING_SHARE, CalibrationConfig, RunConfig
from lowrank_core.files.gguf import is_gguf
from lowrank_core.runs import home
from lowrank_core.studio.shared.formatting import size
from lowrank_core.studio.shared.model_facts import ModelFacts

__all__ = ["DEVICE", "DISK", "MEMORY", "Fit", "FitLine", "Gpu", "Machine", "fit_of", "fit_table", "gpus_in", "this_machine"]

MEMORY, DEVICE, DISK = "memory", "GPU memory", "disk"
_FLOAT64 = 8  # bytes
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED = 2
"""Float64 matrices that are kept of each input: pooled and sample covariance."""
_HIDDEN_FILES = 2
"""Hidden states before and after the current block."""
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A GPU from nvidia-smi; bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """Free resources of this machine in bytes; ``gpu`` is None if nvidia-smi is absent or lists none."""

    memory: int
    disk: int
    gpu: Gpu | None


@dataclass(frozen=True)
class FitLine:
    """One summand.

    Attributes:
        place: ``MEMORY``, ``DEVICE`` or ``DISK``.
        how: how it is counted, in words.
    """

    part: str
    place: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Fit:
    """The estimate's lines and the machine."""

    lines: tuple[FitLine, ...]
    machine: Machine

    def needed(self, place: str) -> int:
        return sum(line.bytes for line in self.lines if line.place == place)

    def free(self, place: str) -> int:
        if place == DEVICE:
            return self.machine.gpu.free if self.machine.gpu else 0
        return self.machine.memory if place == MEMORY else self.machine.disk

    @property
    def places(self) -> list[str]:
        """Resources that are needed."""
        return [place for place in (MEMORY, DEVICE, DISK) if self.needed(place)]

    @property
    def short_of(self) -> list[str]:
        """Resources that do not suffice."""
        return [place for place in self.places if self.needed(place) > self.free(place)]


def fit_of(facts: ModelFacts, config: RunConfig, machine: Machine) -> Fit:
    """Return the needs of calibrating the model of ``facts`` by ``config``; parameters and widths are exact, the rest is estimated."""
    on_gpu = machine.gpu is not None and config.model.device != "cpu"
    held = _held(facts, config, on_gpu=on_gpu)
    budget = config.model.memory_bytes or machine.memory
    on_disk = not on_gpu and not is_gguf(facts.reference) and facts.parameters * held * WORKING_SHARE > budget
    place, text = (DEVICE if on_gpu else MEMORY), config.text
    blocks = _blocks(facts)
    block = max((_squares(widths) for widths in blocks.values()), default=0)
    every = sum(_squares(widths) for widths in blocks.values())
    windows, batch = text.calibration_windows, min(config.calibration.batch_size, text.calibration_windows)
    passing, matrices = _passing(facts), CALIBRATION_MATRICES + _trimmed(config.calibration, windows)
    hidden = windows * text.context * facts.hidden
    return Fit(
        (
            FitLine(
                "Weights, read block by block" if on_disk else "Weights",
                DISK if on_disk else place,
                facts.parameters * held,
                f"{facts.parameters:,} parameters × {held} bytes",
            ),
            FitLine(
                "Statistics of the current block",
                place,
                block * _FLOAT64 * matrices,
                f"Σ n² over the distinct inputs of the widest block ({block:,}) × 8 bytes × {matrices} matrices",
            ),
            FitLine(
                "Activations",
                place,
                batch * text.context * passing * held,
                f"{batch} windows × {text.context} tokens × {passing:,} inputs and outputs of a block's linears × {held} bytes",
            ),
            FitLine(
                "Statistics kept",
                DISK,
                every * _FLOAT64 * _STORED,
                f"Σ n² over all {len(facts.input_widths)} distinct inputs ({every:,}) × 8 bytes × {_STORED} covariances",
            ),
            FitLine(
                "Hidden states, until it is done",
                DISK,
                hidden * held * _HIDDEN_FILES,
                f"{windows} windows × {text.context} tokens × {facts.hidden:,} × {held} bytes, before and after a block",
            ),
        ),
        machine,
    )


def _trimmed(calibration: CalibrationConfig, windows: int) -> int:
    """Return how many groups' covariances wait outside a trimmed pooling: a tenth of the groups, rounded up, at each end."""
    groups = -(-windows // calibration.group_size)
    return 2 * -(-groups // 10) if calibration.robust == "trimmed" else 0


def _held(facts: ModelFacts, config: RunConfig, *, on_gpu: bool) -> int:
    """Return bytes of a weight in memory, by the rule of ``ModelSource.dtype``."""
    if config.model.dtype != "auto":
        return _BYTES[config.model.dtype]
    stored = _BYTES.get(facts.stored_dtype) or max(1, round(facts.bytes / max(1, facts.parameters)))
    return stored if on_gpu else _BYTES["float32"]


def _blocks(facts: ModelFacts) -> dict[int, dict[str, int]]:
    """Return depth -> distinct input -> its width."""
    result: dict[int, dict[str, int]] = {}
    for matrix in facts.matrices:
        result.setdefault(matrix.depth, {})[matrix.input_group or matrix.name] = matrix.d_in
    return result


def _squares(widths: dict[str, int]) -> int:
    return sum(width * width for width in widths.values())


def _passing(facts: ModelFacts) -> int:
    """Return the widest block's inputs and outputs: what its linears hold of a token, if nothing is freed."""
    sizes: dict[int, int] = {}
    for matrix in facts.matrices:
        sizes[matrix.depth] = sizes.get(matrix.depth, 0) + matrix.d_in + matrix.d_out
    return max(sizes.values(), default=0)


def fit_table(fit: Fit) -> pd.DataFrame:
    """Return a row for each line, then one for each place with what is needed and free of it."""
    rows = [{"part": line.part, "place": line.place, "size": size(line.bytes), "bytes": line.bytes, "how": line.how} for line in fit.lines]
    for place in fit.places:
        words = f"{size(fit.free(place))} free on this machine"
        total = fit.needed(place)
        rows.append({"part": f"Sum of {place}", "place": place, "size": size(total), "bytes": total, "how": words})
    return pd.DataFrame(rows, columns=["part", "place", "size", "bytes", "how"])


def this_machine() -> Machine:
    """Return free memory, free disk under the home, and the first GPU of nvidia-smi."""
    folder = home()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    gpus = _gpus()
    return Machine(int(psutil.virtual_memory().available), shutil.disk_usage(folder).free, gpus[0] if gpus else None)


@lru_cache(maxsize=1)
def _nvidia_smi() -> str | None:
    return shutil.which(_NVIDIA_SMI[0])


def _gpus() -> Sequence[Gpu]:
    program = _nvidia_smi()
    if program is None:
        return ()
    try:
        done = subprocess.run([program, *_NVIDIA_SMI[1:]], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return gpus_in(done.stdout)


def gpus_in(answer: str) -> tuple[Gpu, ...]:
    """Parse the output of nvidia-smi: a line ``name, total MiB, free MiB`` per GPU."""
    result = []
    for line in answer.splitlines():
        name, total, free = (part.strip() for part in line.rsplit(",", 2)) if line.count(",") >= 2 else ("", "", "")
        if total.isdecimal() and free.isdecimal():
            result.append(Gpu(name, int(total) * 2**20, int(free) * 2**20))
    return tuple(result)

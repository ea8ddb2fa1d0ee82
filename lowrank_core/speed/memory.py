"""The memory that a model takes, measured in a process of its own: nothing that ran before is in the figure."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from lowrank_core.config import ModelSource, to_mapping
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.errors import ModelError
from lowrank_core.runs.measurements import MemoryReport
from lowrank_core.runs.processes import python_command, python_environment

__all__ = ["Meter", "measure_memory"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_RESIDENT = (
    "peak resident memory of a fresh process above what it held when it had run the model once and let it go: weights (also where they "
    "are mapped from the file), key-value cache, activations and what the allocator keeps, without Python and the libraries"
)
_ALLOCATED = "peak of torch's allocator on the GPU in a fresh process: weights, key-value cache and activations, without the CUDA context"
_NOT_AVAILABLE = "not available: only Linux tells a process the peak of its resident memory since a given moment"


class Meter:
    """Peaks since a moment, of the process that asks: CUDA's allocator, or resident memory.

    Attributes:
        available: whether the system tells them.
        measured: what they are, in words.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin: what is held now is the zero that peaks are above."""
        self._cuda = device if device.type == "cuda" else None
        self.available = self._cuda is not None or (_STATUS.exists() and os.access(_RESET, os.W_OK))
        self.measured = _ALLOCATED if self._cuda is not None else _RESIDENT if self.available else _NOT_AVAILABLE
        self._zero = 0
        self.restart()
        self._zero = self.peak() or 0

    def restart(self) -> None:
        """Give back what nobody holds any more, and forget the peak so far."""
        gc.collect()
        if self._cuda is not None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._cuda)
        elif self.available:
            _trim()
            _RESET.write_text("5", encoding="ascii")  # resets VmHWM: man 5 proc_pid_clear_refs

    def peak(self) -> int | None:
        """Return bytes at the peak since the last restart."""
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda) - self._zero
        # Not getrusage's ru_maxrss: a process inherits the peak of the one that started it.
        return max(0, _resident_peak() - self._zero) if self.available else None


def _trim() -> None:
    """Return freed memory to the system, where the C library can: glibc keeps it, and it would count as the next model's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_peak() -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure_memory(source: ModelSource, config: SpeedConfig, *, fingerprint: str = "") -> MemoryReport:
    """Load the model of ``source`` in a fresh process, generate there, and return its peaks.

    Args:
        fingerprint: that the model must have there, where it is known.

    Raises:
        ModelError: that process ended early, or loaded another model.
    """
    threads = torch.get_num_threads()
    request = {"source": to_mapping(source), "config": asdict(config), "threads": threads, "fingerprint": fingerprint}
    result = subprocess.run(
        python_command("-m", "lowrank_core.speed"),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=python_environment(OMP_NUM_THREADS=str(threads)),
        check=False,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise ModelError(
            f"the process that measures the memory of {source.reference} ended early (status {result.returncode}: {last}). "
            "Free some memory, or leave this out with --no-peak-memory."
        )
    return MemoryReport(**json.loads(result.stdout))

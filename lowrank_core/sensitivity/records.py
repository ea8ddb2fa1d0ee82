"""Measured cells in a run's folder: ``sensitivity/<key>.jsonl``, a line for what all cells share, then a line for each cell. Torch-free.

A line is appended when its cell is measured. A process that is killed while it writes leaves at most a torn last line: it counts as not
measured, and the next writer cuts it off.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lowrank_core.config import from_mapping, to_mapping
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs import Run
from lowrank_core.sensitivity.planning import CellKey

__all__ = ["SensitivityCell", "SensitivityRecord", "SensitivitySetting", "append_cell", "read_record", "read_records", "record_path"]

T = TypeVar("T")


@dataclass(frozen=True)
class SensitivitySetting:
    """Shared settings of the cells in one file; cells of different settings are not comparable.

    Attributes:
        basis, storage, input_damping, gradient_damping, input_shrinkage, gradient_shrinkage: of the factors, each matrix by itself.
        windows, tokens: measured on; protocol: in words; text: their SHA-256.
        model: its fingerprint; dtype: it ran in; statistics, gradients: keys of what the factors rest on, empty where they rest on none.
        top_k: tokens that the divergence distinguishes; 0 for all.
    """

    basis: str
    storage: str
    input_damping: float
    gradient_damping: float
    windows: int
    tokens: int
    protocol: str
    text: str
    model: str
    dtype: str
    statistics: str
    gradients: str = ""
    top_k: int = 0
    input_shrinkage: float = 0.0
    gradient_shrinkage: float = 0.0

    @property
    def key(self) -> str:
        said = {name: value for name, value in to_mapping(self).items() if value or not name.endswith("_shrinkage")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class SensitivityCell:
    """One measured cell.

    Attributes:
        scope, name, kept: as planned.
        rank: of its matrices, the smallest where they differ; matrices: how many.
        parameters, dense_parameters: of these matrices.
        kl: divergence to the dense model, nats per token; None where the model diverged (``error`` says how).
        kl_stderr: its standard error over windows; None for one window.
        predicted: second-order estimate of kl by a basis whose errors are nats (``two_sided``), summed over the matrices; else None.
        seconds: that it took.
    """

    scope: str
    name: str
    kept: float
    rank: int
    matrices: int
    parameters: int
    dense_parameters: int
    kl: float | None
    kl_stderr: float | None
    predicted: float | None
    seconds: float
    error: str = ""

    @property
    def key(self) -> CellKey:
        return self.scope, self.name, self.kept

    @property
    def kept_share(self) -> float:
        """Kept fraction: at most the requested one, unless rank 1 costs more."""
        return self.parameters / self.dense_parameters


@dataclass(frozen=True)
class SensitivityRecord:
    """A file: its setting, its cells in the order of measuring, and when it last changed (seconds since the epoch)."""

    setting: SensitivitySetting
    cells: tuple[SensitivityCell, ...]
    changed: float = 0.0


def record_path(run: Run, setting: SensitivitySetting) -> Path:
    return run.path / "sensitivity" / f"{setting.key}.jsonl"


def read_record(path: Path) -> SensitivityRecord | None:
    """Return the record in ``path``; None if it is empty.

    Raises:
        RunError: the file is damaged.
    """
    try:
        content, changed = path.read_text(encoding="utf-8"), path.stat().st_mtime
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read: {error}. {_ADVICE}") from error
    first, *lines = content.split("\n")[:-1] or [""]  # what follows the last newline was never finished
    if not first:
        return None
    cells = {cell.key: cell for cell in (_built(SensitivityCell, line, path, number) for number, line in enumerate(lines, start=2))}
    return SensitivityRecord(_built(SensitivitySetting, first, path, 1), tuple(cells.values()), changed)


_ADVICE = "Delete the file to measure again; other files of the run are not affected."


def _built(kind: type[T], line: str, path: Path, number: int) -> T:
    try:
        return from_mapping(kind, json.loads(line))
    except (ValueError, ConfigError) as error:
        raise RunError(f"{path} is damaged in line {number}: {error} {_ADVICE}") from error


def read_records(run: Run) -> list[SensitivityRecord]:
    """Return the records of a run, the one that changed last first.

    Raises:
        RunError: a file is damaged.
    """
    result = [read_record(path) for path in sorted((run.path / "sensitivity").glob("*.jsonl"))]
    return sorted((record for record in result if record is not None), key=lambda record: record.changed, reverse=True)


def append_cell(path: Path, setting: SensitivitySetting, cell: SensitivityCell) -> None:
    """Add a cell at the end of ``path``, which begins with the setting.

    Raises:
        RunError: the disk is full or read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            whole = _whole_bytes(path)
            stream.truncate(whole)
            lines: list[SensitivitySetting | SensitivityCell] = [setting, cell] if whole == 0 else [cell]
            stream.write("".join(json.dumps(to_mapping(line), allow_nan=False) + "\n" for line in lines).encode())
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror}. Free some space, then measure again: what is complete is kept.") from error


def _whole_bytes(path: Path) -> int:
    """Return where the last finished line ends."""
    return path.read_bytes().rfind(b"\n") + 1

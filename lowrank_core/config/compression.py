"""How matrices are factorised, and what `lowrank compress` was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_core.config.calibration import CalibrationConfig
from lowrank_core.config.checks import check_choice, check_min, check_ratio
from lowrank_core.config.export import ExportConfig
from lowrank_core.errors import ConfigError
from lowrank_core.parameters import STORAGES

__all__ = ["CompressRequest", "CompressionConfig"]


@dataclass(frozen=True)
class CompressionConfig:
    """How matrices are factorised and stored.

    Attributes:
        basis: name in ``lowrank_core.metrics.BASES``, or wrappers around one (``shared_input:two_sided``).
        storage: name in ``lowrank_core.parameters.STORAGES``.
        value_dense: keep value projections as they are, as the paper does.
        stacks: offer stacks of matrices with one input as alternatives to single matrices (for an allocation that knows the errors).
        heads: offer per-head value/output factors as alternatives, likewise.
        rank_multiple: ranks are rounded down to a multiple of it, as the paper's code does with 8; 1 leaves them.
        input_damping: of the inputs' metric, relative to its mean eigenvalue.
        gradient_damping: of the output gradients' metric, likewise.
        drift_beta: β of a drift-aware basis, in [0, 1]: how much of the dense model's input its target follows.
        fit_windows: calibration windows that a sequential basis fits on, at most; each is run through every block several times.
    """

    basis: str = "pooled_feature"
    storage: str = "factored"
    value_dense: bool = True
    stacks: bool = False
    heads: bool = False
    rank_multiple: int = 1
    input_damping: float = 1e-6
    gradient_damping: float = 1e-2
    drift_beta: float = 1.0
    fit_windows: int = 128

    def __post_init__(self) -> None:
        check_choice("storage", self.storage, STORAGES)
        check_min(1, rank_multiple=self.rank_multiple, fit_windows=self.fit_windows)
        for name, value in (("input damping", self.input_damping), ("gradient damping", self.gradient_damping)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number from 0 up, relative to the mean eigenvalue; got {value:g}. Try 0.01.")

        if not 0 <= self.drift_beta <= 1:
            raise ConfigError(f"drift beta must lie between 0 and 1, got {self.drift_beta:g}. Try 1.")


@dataclass(frozen=True)
class CompressRequest:
    """What `lowrank compress` was asked for: a ratio and an allocator, or a file of ranks; ``preset`` is empty if there was none.

    ``complete`` names the allocator that spends on the others what the locked ranks of the file leave of the budget; with ``slopes``
    errors are weighed by what they cost the model, measured on validation text. ``command`` is for the model card.
    """

    compression_ratio: float | None
    preset: str
    tune: bool
    calibration: CalibrationConfig
    compression: CompressionConfig
    allocation: str
    ranks: str | None
    out: Path
    complete: str | None = None
    error_weights: bool = False
    export: ExportConfig = field(default_factory=ExportConfig)
    command: str = ""

    def __post_init__(self) -> None:
        if self.compression_ratio is None and self.ranks is None:
            raise ConfigError("compress: give --compression-ratio, or --ranks FILE.")
        if self.compression_ratio is not None:
            check_ratio(self.compression_ratio)
        if self.complete is not None and (self.ranks is None or self.compression_ratio is None):
            raise ConfigError("--complete completes a file of ranks at a ratio: give --ranks and --compression-ratio.")
        if self.error_weights and self.compression_ratio is None:
            raise ConfigError("--slopes weighs the errors of an allocation at a ratio: give --compression-ratio.")
        if self.tune and self.ranks is not None:
            raise ConfigError("--tune compares settings at a ratio; give --compression-ratio instead of --ranks.")

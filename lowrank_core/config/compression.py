"""Settings of factorisation and of `lowrank compress`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_core.config.calibration import CalibrationConfig
from lowrank_core.config.checks import check_choice, check_ratio
from lowrank_core.config.export import ExportConfig
from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["BUDGETS", "CompressRequest", "CompressionConfig"]


@dataclass(frozen=True)
class CompressionConfig:
    """Factorisation and storage of matrices."""

    basis: str = option(
        "pooled_feature",
        "how the error of a matrix is weighted, and so which directions are kept; wrappers go around another (shared_input:two_sided)",
        label="Error metric",
    )
    storage: str = option(
        "factored",
        "factored: two factors, r(m + n) parameters; pivoted (PIFA): the same matrix, r(m + n - r) parameters",
        label="Storage",
        choices={"factored": "Two factors", "pivoted": "Pivoted (PIFA)"},
    )
    value_dense: bool = option(True, "keep the value projections as they are, as the paper does", label="Keep value projections dense")
    stacks: bool = option(
        False, "offer stacks of matrices with one input as alternatives to single matrices; needs error weights", label="Offer stacks"
    )
    heads: bool = option(
        False,
        "offer per-head value/output factors as alternatives, likewise; needs values that may be compressed",
        label="Offer per-head factors",
    )
    modules: bool = option(
        False,
        "reduce modules in place of matrices, as MoDeGPT does: channels of MLPs, values and outputs per head, queries and keys by rotary "
        "pairs; with the metric whitened",
        label="Reduce modules",
    )
    rank_multiple: int = option(
        1, "round ranks down to a multiple of it, as the paper's code does with 8", label="Ranks in multiples of", minimum=1
    )
    input_damping: float = option(1e-6, "of the inputs' metric, relative to its mean eigenvalue", label="Input damping", minimum=0.0)
    gradient_damping: float = option(
        1e-2, "of the output gradients' metric, relative to its mean eigenvalue", label="Gradient damping", minimum=0.0
    )
    input_shrinkage: float = option(
        0.0,
        "α of a two-sided metric's input moments: (1 - α) M + α · mean(diag M) · I takes the place of M; unlike damping, errors count it",
        label="Input shrinkage",
        minimum=0.0,
        maximum=1.0,
        step=0.1,
    )
    gradient_shrinkage: float = option(
        0.0, "the same of its output gradients", label="Gradient shrinkage", minimum=0.0, maximum=1.0, step=0.1
    )
    robust_gradients: bool = option(
        False,
        "moments of output gradients from robust token weights: a token's norm is clipped to 0.1 to 10 x the mean of its window, and the "
        "first and last eighth of the positions are left out",
        label="Robust token weights in gradients",
    )
    drift_beta: float = option(
        1.0,
        "β of a drift-aware metric: how much of the dense model's input its target follows",
        label="Drift β",
        minimum=0.0,
        maximum=1.0,
        step=0.1,
    )
    fit_windows: int = option(
        64,
        "calibration windows that a sequential metric runs through the compressed blocks, at most, from the first; the others count as "
        "tokens without drift",
        label="Fitted windows",
        minimum=1,
    )

    def __post_init__(self) -> None:
        for name, value in (("input damping", self.input_damping), ("gradient damping", self.gradient_damping)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number from 0 up, relative to the mean eigenvalue; got {value:g}. Try 0.01.")
        if not 0 <= self.drift_beta <= 1:
            raise ConfigError(f"drift beta must lie between 0 and 1, got {self.drift_beta:g}. Try 1.")
        check_options(self)
        if self.modules and (self.stacks or self.heads or (self.basis, self.storage) != ("whitened", "factored")):
            raise ConfigError(
                "--modules has forms of its own, in the metric whitened: give --basis whitened --storage factored, without --stacks and "
                "--heads, or --preset modegpt."
            )


BUDGETS = ("parameters", "bytes")
"""Quantities that a compression ratio may be a fraction of."""


@dataclass(frozen=True)
class CompressRequest:
    """Arguments of `lowrank compress`: a ratio and an allocator, or a file of ranks; ``preset`` is empty if none.

    ``complete`` names the allocator that spends on the others what the locked ranks of the file leave of the budget; with ``slopes``
    errors are weighed by what they cost the model, measured on validation text, with ``deep_weights`` at a deep cut. ``command`` is for
    the model card. With a ``budget`` of bytes the ratio is of the bytes that the compressible linears take in 16 bits.
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
    deep_weights: bool = False
    export: ExportConfig = field(default_factory=ExportConfig)
    command: str = ""
    budget: str = "parameters"

    def __post_init__(self) -> None:
        check_choice("budget", self.budget, BUDGETS)
        if self.budget == "bytes":
            self._check_bytes()
        else:
            self.export.check_rounding()
        if self.compression_ratio is None and self.ranks is None:
            raise ConfigError("compress: give --compression-ratio, or --ranks FILE.")
        if self.compression_ratio is not None and not self.stays_dense:
            check_ratio(self.compression_ratio)
        if self.stays_dense and (self.tune or self.error_weights):
            raise ConfigError("at --compression-ratio 0 every layer stays dense: leave --tune and --slopes out.")
        if self.complete is not None and (self.ranks is None or self.compression_ratio is None):
            raise ConfigError("--complete completes a file of ranks at a ratio: give --ranks and --compression-ratio.")
        if self.error_weights and self.compression_ratio is None:
            raise ConfigError("--slopes weighs the errors of an allocation at a ratio: give --compression-ratio.")
        if self.deep_weights and not self.error_weights:
            raise ConfigError("--deep-weights says where error weights are measured: give --error-weights, too.")
        if self.tune and self.ranks is not None:
            raise ConfigError("--tune compares settings at a ratio; give --compression-ratio instead of --ranks.")

    def _check_bytes(self) -> None:
        """Raises: ConfigError: an option that a budget of bytes has no place for."""
        refused = {
            "--ranks": self.ranks is not None,
            "--tune": self.tune,
            "--slopes": self.error_weights,
            "--quantize and --quantize-dense": self.export.quantizes,
            "--form dense": self.export.form == "dense",
            f"--allocation {self.allocation}": self.allocation != "lagrangian",
        }
        given = [name for name, there in refused.items() if there]
        if given:
            raise ConfigError(f"--budget bytes chooses rank and grid of every layer by the allocation lagrangian: leave out {given[0]}.")

    @property
    def stays_dense(self) -> bool:
        """Whether nothing is removed and dense layers are quantised: nothing is decomposed then, and only GPTQ calibrates."""
        return self.compression_ratio == 0 and self.ranks is None and self.export.dense_quantization != "none"

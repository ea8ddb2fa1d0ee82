"""What the user chose, as frozen values that check themselves and turn into JSON and back."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lowrank_core.accounting import STORAGES
from lowrank_core.errors import ConfigError

__all__ = [
    "CalibrationConfig",
    "CompressRequest",
    "CompressionConfig",
    "ExportConfig",
    "ModelSource",
    "RunConfig",
    "SearchConfig",
    "TextConfig",
    "check_ratio",
    "depth_groups",
    "from_mapping",
    "looks_like_path",
    "to_mapping",
]

DTYPES = ("auto", "float32", "bfloat16")
OBJECTIVES = ("kl", "perplexity", "bolaco")
SAMPLERS = ("gp", "tpe", "cmaes", "qmc", "random")
VARIABLES = ("kept", "errors")
PRUNERS = ("none", "wilcoxon")
SPACES = ("5x1", "5x4", "per-layer")
"""The usual spaces; ``types x N`` with any number N of depth groups is one, too."""
BOS_RULES = ("auto", "window", "none")
GROUP_WEIGHTS = ("equal", "dof")
ROBUST_RULES = ("none", "trimmed", "downweighted")
EXPORT_FORMS = ("compressed", "dense")
EXPORT_DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8")

TOKENS_PER_DIMENSION = 8
"""Below this many tokens per input dimension a covariance says little about small eigenvalues (METHODS §1)."""

T = TypeVar("T")


def looks_like_path(reference: str) -> bool:
    """Return whether ``reference`` can only be a path, there or not: a hub id is ``name`` or ``owner/name``."""
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference


def check_ratio(compression_ratio: float) -> float:
    """Return ``compression_ratio`` if it is a fraction to remove, in (0, 1).

    Raises:
        ConfigError: it is not.
    """
    if not 0 < compression_ratio < 1:
        hint = "; 0 would remove nothing" if compression_ratio == 0 else ""
        raise ConfigError(
            f"compression ratio must lie between 0 and 1 (the fraction of parameters removed), got {compression_ratio:g}{hint}. Try 0.2."
        )
    return compression_ratio


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name.replace('_', ' ')} must be at least {least}, got {value}.")


@dataclass(frozen=True)
class ModelSource:
    """Where a causal language model comes from, and how to hold it.

    Attributes:
        reference: ``demo`` (the bundled model), a local folder, or a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (float32 on a CPU, the checkpoint's own on an accelerator), ``float32`` or ``bfloat16``.
    """

    reference: str = "demo"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ConfigError("model: give `demo`, a local folder, or a hub id.")
        _check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how it is cut into windows.

    Attributes:
        reference: ``python-stdlib``, ``file:PATH``, ``wikitext-2``, ``c4``, ``ptb``, or ``NAME:FOLDER`` for a local copy of those.
        context: tokens in a window, BOS included.
        calibration_windows: windows that the statistics are measured on, drawn at random with ``seed``.
        validation_windows: windows that a search sees in each trial, evenly spaced over the split.
        test_windows: windows that final figures are measured on, evenly spaced over the split.
        bos: ``window`` puts BOS first in every window, ``none`` nowhere, ``auto`` does as the tokenizer does.
        seed: of the draw of calibration windows.
    """

    reference: str = "python-stdlib"
    context: int = 256
    calibration_windows: int = 256
    validation_windows: int = 24
    test_windows: int = 128
    bos: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ConfigError("text: give `python-stdlib`, `file:PATH`, `wikitext-2`, `c4` or `ptb`.")
        _check_at_least(2, context=self.context)
        _check_at_least(
            1,
            calibration_windows=self.calibration_windows,
            validation_windows=self.validation_windows,
            test_windows=self.test_windows,
        )
        _check_choice("bos", self.bos, BOS_RULES)
        _check_at_least(0, seed=self.seed)


@dataclass(frozen=True)
class CalibrationConfig:
    """How feature statistics are pooled (Bolaco, Eq. 4).

    Attributes:
        group_size: consecutive windows in a group of the pooled covariance; a remainder forms its own group.
        group_weights: ``equal`` (the paper) or ``dof`` (by degrees of freedom).
        batch_size: windows in a forward pass; changes speed and memory, and results only by rounding.
        robust: ``none``; ``trimmed`` leaves the tenth of the groups with the largest and with the smallest trace out of the pooled
            covariance; ``downweighted`` gives a token beyond 3 median norms of its window the weight (3 · median / norm)².
        gradient_windows: windows that output gradients are measured on, from the first; all if there are fewer.
        gradient_seed: of the labels that are drawn from the model for the gradients.
    """

    group_size: int = 32
    group_weights: str = "equal"
    batch_size: int = 8
    robust: str = "none"
    gradient_windows: int = 256
    gradient_seed: int = 0

    def __post_init__(self) -> None:
        _check_at_least(1, group_size=self.group_size, batch_size=self.batch_size, gradient_windows=self.gradient_windows)
        _check_at_least(0, gradient_seed=self.gradient_seed)
        _check_choice("group weights", self.group_weights, GROUP_WEIGHTS)
        _check_choice("robust", self.robust, ROBUST_RULES)


@dataclass(frozen=True)
class CompressionConfig:
    """How matrices are factorised and stored.

    Attributes:
        basis: name in ``lowrank_core.bases.BASES``, or wrappers around one (``shared_input:two_sided``).
        storage: name in ``lowrank_core.accounting.STORAGES``.
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
        _check_choice("storage", self.storage, tuple(STORAGES))
        _check_at_least(1, rank_multiple=self.rank_multiple, fit_windows=self.fit_windows)
        for name, value in (("input damping", self.input_damping), ("gradient damping", self.gradient_damping)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number from 0 up, relative to the mean eigenvalue; got {value:g}. Try 0.01.")

        if not 0 <= self.drift_beta <= 1:
            raise ConfigError(f"drift beta must lie between 0 and 1, got {self.drift_beta:g}. Try 1.")


@dataclass(frozen=True)
class ExportConfig:
    """How a compressed model is written as a folder.

    Attributes:
        form: ``compressed``, the factors; ``dense``, their products in the plain architecture: for any runtime, and not smaller.
        with_code: write our code beside the weights, so that the folder loads with ``trust_remote_code`` without this package.
        dtype: ``auto`` (that of the checkpoint that the model was made from), ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: of one weight file, such as ``2GB`` (units KB to TB, of 1000); a larger matrix has a file of its own.
        quantization: of the factors: ``none``, or ``int8``, whole numbers with one scale for each row.
    """

    form: str = "compressed"
    with_code: bool = False
    dtype: str = "auto"
    max_shard_size: str = "50GB"
    quantization: str = "none"

    def __post_init__(self) -> None:
        _check_choice("form", self.form, EXPORT_FORMS)
        _check_choice("dtype", self.dtype, EXPORT_DTYPES)
        _check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.form == "dense" and self.quantization != "none":
            raise ConfigError("a dense folder holds no factors that could be in 8 bits; write the form compressed, or leave int8 out.")
        if self.form == "dense" and self.with_code:
            raise ConfigError("a dense folder loads without any code of ours; leave --with-code out.")
        if not re.fullmatch(r"[1-9]\d*(\.\d+)? ?[KMGT]B", self.max_shard_size.upper()):
            raise ConfigError(f"max shard size must be a number with a unit from KB to TB, got {self.max_shard_size!r}. Try 2GB.")

    @property
    def shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        amount, unit = self.max_shard_size[:-2], self.max_shard_size[-2:].upper()
        return int(float(amount) * 1000 ** (1 + "KMGT".index(unit[0])))

    def folder_name(self, name: str) -> str:
        """Return the name of the folder for the model ``name``: with a word for each choice that is not the usual one."""
        usual = ExportConfig()
        words = (
            (self.form, self.form != usual.form),
            ("with-code", self.with_code),
            (self.dtype, self.dtype != usual.dtype),
            (self.quantization, self.quantization != usual.quantization),
            (f"shards-of-{self.max_shard_size.upper()}", self.shard_bytes != usual.shard_bytes),
        )
        return "-".join([name, *(word for word, said in words if said)]).replace(" ", "-")

    @property
    def options(self) -> dict[str, object]:
        """Options of the command line that say the same, by name; True is a flag. What is usual is left out."""
        usual = ExportConfig()
        found = {"form": self.form, "with_code": self.with_code, "dtype": self.dtype, "max_shard_size": self.max_shard_size}
        said: dict[str, object] = {name: value for name, value in found.items() if value != getattr(usual, name)}
        return said | ({} if self.quantization == usual.quantization else {"quantize": self.quantization})


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
    slopes: bool = False
    export: ExportConfig = field(default_factory=ExportConfig)
    command: str = ""

    def __post_init__(self) -> None:
        if self.compression_ratio is None and self.ranks is None:
            raise ConfigError("compress: give --compression-ratio, or --ranks FILE.")
        if self.compression_ratio is not None:
            check_ratio(self.compression_ratio)
        if self.complete is not None and (self.ranks is None or self.compression_ratio is None):
            raise ConfigError("--complete completes a file of ranks at a ratio: give --ranks and --compression-ratio.")
        if self.slopes and self.compression_ratio is None:
            raise ConfigError("--slopes weighs the errors of an allocation at a ratio: give --compression-ratio.")
        if self.tune and self.ranks is not None:
            raise ConfigError("--tune compares settings at a ratio; give --compression-ratio instead of --ranks.")


def depth_groups(space: str) -> int | None:
    """Return in how many groups of blocks the space ``space`` has variables of their own; None where every unit has one.

    Raises:
        ConfigError: there is no such space.
    """
    if space == "per-layer":
        return None
    found = re.fullmatch(r"(?:5|types) ?x ?([1-9]\d*)", space)
    if found is None:
        raise ConfigError(f"space must be one of {', '.join(SPACES)}, or `types x N` with N depth groups; got {space!r}.")
    return int(found[1])


@dataclass(frozen=True)
class SearchConfig:
    """A search for the allocation that loses least at a given compression ratio.

    Attributes:
        compression_ratio: fraction of the compressible linears' parameters to remove.
        most_ratio: with it every trial has a ratio of its own, from ``compression_ratio`` to this, and the search has two objectives:
            to remove much, and to lose little. Its answer is a Pareto front.
        space: what has a variable: ``5x1``, each module type (q and k together), shared by depth; ``5x4``, the same in four groups of
            blocks; ``types x N``, in N groups; ``per-layer``, every unit.
        variables: what a variable multiplies: ``kept``, the fraction of parameters that is kept (the paper's); ``errors``, the weight
            of the errors that the allocator marginal trades: at 1 everywhere the point is marginal's own.
        slopes: weigh the error of every unit by what it costs the model, ΔKL/Δe, measured unit by unit on validation text before the
            first trial: for a basis whose errors are not comparable.
        sampler: ``gp`` (the paper's Gaussian process), ``tpe``, ``cmaes``, ``qmc`` or ``random``.
        objective: ``kl`` (to the dense model, nats per token), ``perplexity``, or ``bolaco`` (PPL + 1e-3·summed reverse KL).
        trials: how many, baselines included.
        projected: spend the whole budget at every point; False is as published: a point is the kept fractions themselves, and counts
            only if it removes at least the compression ratio, and at most a tenth more.
        startup_trials: points before the sampler's model takes over (the paper: 3 initial points).
        pruner: ``none``, or ``wilcoxon``: stop a trial whose windows are worse than the best trial's by a signed-rank test.
        top_k: measure the KL divergence on the dense model's k likeliest tokens and the rest of them taken together, a lower bound
            that needs less memory; 0 on the whole vocabulary.
        autocast: run trials in bfloat16; the dense model that they are compared with stays as it is.
        confirmed: how many of the best trials are measured on test text when the search is done.
        seed: of the sampler.
    """

    compression_ratio: float = 0.2
    most_ratio: float | None = None
    space: str = "5x1"
    variables: str = "kept"
    slopes: bool = False
    sampler: str = "gp"
    objective: str = "kl"
    trials: int = 30
    startup_trials: int = 5
    projected: bool = True
    pruner: str = "none"
    top_k: int = 0
    autocast: bool = False
    confirmed: int = 3
    seed: int = 0
    compression: CompressionConfig = field(default_factory=CompressionConfig)

    def __post_init__(self) -> None:
        check_ratio(self.compression_ratio)
        _check_at_least(1, trials=self.trials, startup_trials=self.startup_trials)
        _check_at_least(0, seed=self.seed, top_k=self.top_k, confirmed=self.confirmed)
        depth_groups(self.space)
        _check_choice("variables", self.variables, VARIABLES)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("objective", self.objective, OBJECTIVES)
        _check_choice("pruner", self.pruner, PRUNERS)
        if self.most_ratio is not None:
            self._check_two_objectives(check_ratio(self.most_ratio))
        if not self.projected and self.variables != "kept":
            raise ConfigError(
                "a search as published has kept fractions for variables; choose variables `kept`, or let points be projected."
            )
        if self.variables == "kept" and (self.compression.stacks or self.compression.heads):
            raise ConfigError("kept fractions can't choose between single matrices and stacks or heads; choose variables `errors`.")
        if self.objective == "bolaco" and self.top_k:
            raise ConfigError("the objective bolaco needs every token's probability; leave top-k at 0, or choose the objective kl.")

    def _check_two_objectives(self, most: float) -> None:
        if most <= self.compression_ratio:
            raise ConfigError(f"the largest ratio, {most:g}, must lie above the compression ratio {self.compression_ratio:g}.")
        if self.sampler == "cmaes":
            raise ConfigError("CMA-ES has one objective; for a range of ratios choose the sampler gp, tpe, qmc or random.")
        if self.pruner != "none":
            raise ConfigError("a trial with two objectives can't be stopped early; leave the pruner out for a range of ratios.")
        if not self.projected:
            raise ConfigError("a search as published has one ratio; let points be projected for a range of ratios.")


@dataclass(frozen=True)
class RunConfig:
    """Everything that a worker needs to repeat a run; ``search`` is None for a run that only analyses."""

    model: ModelSource = field(default_factory=ModelSource)
    text: TextConfig = field(default_factory=TextConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    search: SearchConfig | None = None


def to_mapping(value: object) -> dict[str, object]:
    """Return a dataclass as a JSON-ready mapping."""
    return dataclasses.asdict(value)  # type: ignore[call-overload, no-any-return]


def from_mapping(kind: type[T], mapping: Mapping[str, object]) -> T:
    """Build the dataclass ``kind`` from JSON, nested dataclasses included.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{kind.__name__}: expected an object, got {type(mapping).__name__}.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(mapping) - set(hints))
    if unknown:
        raise ConfigError(f"{kind.__name__}: unknown {', '.join(unknown)}; it knows {', '.join(hints)}.")
    try:
        return kind(**{name: _decode(hints[name], value) for name, value in mapping.items()})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def _decode(hint: object, value: object) -> object:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ConfigError(f"expected {hint.__name__}, got {value!r}.")
    return value

"""Settings of the benchmarks of ``lowrank benchmark``."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.checks import check_ratio
from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["AllocationBenchmark", "DecompositionBenchmark", "PaceBenchmark", "QualityBenchmark", "SearchBenchmark", "SpeedBenchmark"]

_RATIOS, _SEEDS, _TRIALS = "fractions of parameters to remove", "seeds 0 to N-1", "of each search"


def _check_ratios(ratios: tuple[float, ...]) -> None:
    for ratio in ratios:
        check_ratio(ratio)


@dataclass(frozen=True)
class QualityBenchmark:
    """Perplexity and KL of every preset on test text, at equal parameters."""

    ratios: tuple[float, ...] = option((0.2, 0.4, 0.6), _RATIOS, flag="compression-ratio")
    presets: tuple[str, ...] = option((), "some of the presets", fallback="all")
    variants: bool = option(False, "also our default with one part left out or changed")
    search: bool = option(False, "also the paper's search, as published (50 trials for each ratio)")
    int8: bool = option(False, "also with int8 factors, in separate columns")
    dense: bool = option(
        False,
        "also the dense model in int8 and int4 (to nearest, by GPTQ; groups of 64 and 128), presets by lagrangian in as many bytes, and a "
        "table by bytes",
    )

    def __post_init__(self) -> None:
        _check_ratios(self.ratios)


@dataclass(frozen=True)
class SpeedBenchmark:
    """Time ratios: calibration and a trial against forward passes, factored and pivoted layers against dense ones."""


@dataclass(frozen=True)
class SearchBenchmark:
    """Convergence of searches (Bolaco as published, random, Studio) over seeds, and the effect of cheaper trials."""

    ratios: tuple[float, ...] = option((0.4,), _RATIOS, flag="compression-ratio")
    seeds: int = option(5, _SEEDS, minimum=1)
    trials: int = option(50, _TRIALS, minimum=1)
    schemes: tuple[str, ...] = option((), "some of what is compared", fallback="all")

    def __post_init__(self) -> None:
        check_options(self)
        _check_ratios(self.ratios)


@dataclass(frozen=True)
class AllocationBenchmark:
    """Bolaco's metric with uniform, fixed and searched ranks on test text."""

    ratios: tuple[float, ...] = option((0.2, 0.3), _RATIOS, flag="compression-ratio")
    seeds: int = option(3, _SEEDS, minimum=1)
    trials: int = option(30, _TRIALS, minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
        _check_ratios(self.ratios)


@dataclass(frozen=True)
class DecompositionBenchmark:
    """Decomposition of one wide matrix in the two-sided metric, next to its singular value decomposition: CPU seconds and errors."""

    shapes: tuple[str, ...] = option(("1024x2752", "2752x1024"), "matrices, d_out x d_in each; both metrics of one are held in float64")
    turns: int = option(3, "of each way; medians are shown", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
        _ = self.pairs

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(d_out, d_in) of each matrix.

        Raises:
            ConfigError: one is not two positive numbers.
        """
        result = []
        for shape in self.shapes:
            d_out, _, d_in = shape.partition("x")
            if not (d_out.isdecimal() and d_in.isdecimal() and int(d_out) and int(d_in)):
                raise ConfigError(f"shapes: {shape!r} is no shape. Give d_out x d_in, such as 4096x11008.")
            result.append((int(d_out), int(d_in)))
        return tuple(result)


@dataclass(frozen=True)
class PaceBenchmark:
    """CPU seconds of every stage of compress in units of a forward pass, its memory and disk; next to an earlier build."""

    compression_ratio: float = option(0.2, "fraction of parameters to remove")
    preset: str = option("", "recipe of the compression", fallback="that of compress")
    against: str = option("", "git revision of an earlier build, run in turns from a checkout of its own", fallback="none")
    turns: int = option(1, "runs of each build; medians are shown", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)
        check_ratio(self.compression_ratio)

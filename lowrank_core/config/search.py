"""Settings of a search."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lowrank_core.config.checks import check_ratio
from lowrank_core.config.compression import CompressionConfig
from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["DEPTH", "MIN_LOSS", "OBJECTIVES", "PRUNERS", "SAMPLERS", "SPACES", "VARIABLES", "SearchConfig", "depth_groups"]

OBJECTIVES = {
    "kl": "KL to the dense model (nats per token)",
    "perplexity": "Perplexity",
    "bolaco": "Bolaco: perplexity + 0.001 x reverse KL of a window",
}
SAMPLERS = {
    "gp": "Gaussian process",
    "tpe": "TPE (tree-structured Parzen estimator)",
    "cmaes": "CMA-ES",
    "qmc": "Quasi-random (Sobol)",
    "random": "Random",
}
VARIABLES = {"keep_ratio": "Keep ratios", "error_weight": "Error weights around the Lagrangian allocation"}
PRUNERS = {"none": "Measure every trial to the end", "wilcoxon": "Stop bad trials early (Wilcoxon test)"}
_DRAWING = ("gp", "random")
"""Samplers of a search as published."""
MIN_LOSS = 1e-9
"""A loss below it has the logarithm of this one."""
DEPTH = "depth"
"""Space of the two variables of a depth bias."""
SPACES = ("5x1", "5x4", "per-layer", DEPTH)
"""The usual spaces; ``types x N`` with any number N of depth groups is one, too."""


@dataclass(frozen=True)
class SearchConfig:
    """A search for the allocation that loses least at a given compression ratio."""

    compression_ratio: float = option(
        0.2, "fraction of the compressible linears' parameters to remove, in (0, 1)", label="Compression ratio (parameters removed)"
    )
    max_ratio: float | None = option(
        None,
        "search every ratio from the compression ratio up to this one: two objectives, and a Pareto front for an answer",
        label="Largest compression ratio",
        formerly=("most_ratio",),
    )
    space: str = option(
        "5x1",
        "what has a variable: 5x1, each module type (q and k together), shared by depth; 5x4, in four groups of blocks; `types x N`, in N "
        "groups; per-layer, every unit; depth, two variables α and γ: the error weight of block b is 1 + γ Σ_{k>=b} (k + 1)^-α, scaled "
        "(LEMS)",
        label="Space",
    )
    variables: str = option(
        "keep_ratio",
        "what a variable multiplies: the kept fraction of its matrices, as in the paper, or the weight of their errors when the "
        "Lagrangian allocator trades them",
        label="Variables",
        choices=VARIABLES,
        fallback="the preset's, or keep_ratio",
        values_formerly={"kept": "keep_ratio", "errors": "error_weight"},
    )
    error_weights: bool = option(
        False,
        "weigh the error of every unit by what it costs the model, ΔKL/Δe, measured on validation text before the first trial: for a "
        "metric whose errors are not comparable",
        label="Measured error weights",
        formerly=("slopes",),
    )
    deep_weights: bool = option(
        False,
        "measure the error weights with each unit cut to a tenth of its break-even rank (LEMS), instead of its rank in a uniform "
        "allocation",
        label="Error weights at a deep cut",
    )
    sampler: str = option(
        "gp",
        "what proposes the next trial; a Gaussian process takes up to 30 variables, CMA-ES one ratio",
        label="Sampler",
        choices=SAMPLERS,
    )
    objective: str = option(
        "kl",
        "what a trial is judged by, on search-validation text; bolaco: perplexity + 1e-3 · reverse KL, summed over the tokens of a window "
        "and averaged over windows",
        label="Objective",
        choices=OBJECTIVES,
        fallback="kl, or the preset's",
    )
    trials: int = option(30, "trials, baselines included", label="Trials", minimum=1, fallback="30, or the preset's")
    stop_when_flat: bool = option(
        False,
        "end the search before its number of trials: after ten trials in a row, the startup trials not counted, after each of which the "
        "95 % interval of what the search added over its best rule, on validation text, did not lie above zero",
        label="Stop when flat",
    )
    startup_trials: int = option(5, "points before the sampler's model takes over (the paper: 3)", label="Startup trials", minimum=1)
    projected: bool = option(
        True,
        "spend the whole budget at every point; without it, as published: a point is the kept fractions themselves, and drawn only if they "
        "remove at least the compression ratio, and at most a tenth of the parameters more; there are no baselines",
        label="Points projected onto the budget",
    )
    selected_windows: int = option(
        0,
        "of a search as published: trials see so many windows, those of the validation split whose perplexity varies most over 20 random "
        "allocations (the paper: 100); 0 takes the text's validation windows",
        label="Selected windows",
        minimum=0,
    )
    pruner: str = option(
        "none",
        "wilcoxon: stop a trial whose windows are worse than the best trial's by a signed-rank test",
        label="Bad trials",
        choices=PRUNERS,
    )
    top_k: int = option(
        0,
        "measure KL on the dense model's k likeliest tokens and the rest taken together, a lower bound that needs less memory; 0: all",
        label="Likeliest tokens compared (top-k)",
        minimum=0,
        step=64,
    )
    autocast: bool = option(
        False, "run trials in bfloat16; the dense model that they are compared with stays as it is", label="Trials in bfloat16"
    )
    confirmed: int = option(
        3,
        "best trials that are measured on test text when the search is done, and with them its best rule",
        label="Best trials measured on test text",
        minimum=0,
    )
    seed: int = option(0, "of the sampler", label="Seed of the sampler", flag="search-seed", minimum=0, fallback="that of --seed")
    compression: CompressionConfig = field(default_factory=CompressionConfig)

    def __post_init__(self) -> None:
        check_ratio(self.compression_ratio)
        check_options(self)
        depth_groups(self.space)
        if self.max_ratio is not None:
            self._check_two_objectives(check_ratio(self.max_ratio))
        if self.stop_when_flat and (self.max_ratio is not None or not self.projected):
            raise ConfigError(
                "stop when flat compares trials at one ratio with the rules that a search begins with; a range of ratios and a search as "
                "published have none to compare. Leave it out."
            )
        if not self.projected and self.variables != "keep_ratio":
            raise ConfigError(
                "a search as published has kept fractions for variables; choose variables `keep_ratio`, or let points be projected."
            )
        if self.selected_windows and self.projected:
            raise ConfigError("windows are selected in a search as published alone; leave their number out, or take the preset bolaco.")
        if self.variables == "keep_ratio" and (self.compression.stacks or self.compression.heads):
            raise ConfigError("kept fractions can't choose between single matrices and stacks or heads; choose variables `error_weight`.")
        if self.space == DEPTH and self.variables != "error_weight":
            raise ConfigError("the space depth weighs errors by depth; choose variables `error_weight`.")
        if self.deep_weights and not self.error_weights:
            raise ConfigError("error weights at a deep cut have to be measured: ask for measured error weights as well.")
        if self.objective == "bolaco" and self.top_k:
            raise ConfigError("the objective bolaco needs every token's probability; leave top-k at 0, or choose the objective kl.")

    @property
    def models_logarithms(self) -> bool:
        """Whether the sampler models the logarithms of the losses, and importances are shares of the variance of the logarithms.

        Perplexity, alone or in the paper's sum, has no upper bound: one bad trial a thousand times above the rest leaves a Gaussian
        process no resolution for what distinguishes them. Over a range of ratios every loss spans decades. A search as published
        models the values themselves; and so does one by KL at one ratio, where logarithms gained nothing.
        """
        return self.max_ratio is not None or (self.projected and self.objective != "kl")

    def check_sampler(self) -> None:
        """Raise unless the sampler can propose points of this search; apart from the other checks, as runs of earlier versions must open.

        Raises:
            ConfigError: it can't.
        """
        if not self.projected and self.sampler not in _DRAWING:
            raise ConfigError(
                f"a search as published draws points until one meets the budget, which the sampler {self.sampler} can't. "
                f"Choose {' or '.join(_DRAWING)}, or a search whose points are projected."
            )

    def _check_two_objectives(self, maximum: float) -> None:
        if maximum <= self.compression_ratio:
            raise ConfigError(f"the largest ratio, {maximum:g}, must lie above the compression ratio {self.compression_ratio:g}.")
        if self.sampler == "cmaes":
            raise ConfigError("CMA-ES has one objective; for a range of ratios choose the sampler gp, tpe, qmc or random.")
        if self.pruner != "none":
            raise ConfigError("a trial with two objectives can't be stopped early; leave the pruner out for a range of ratios.")
        if not self.projected:
            raise ConfigError("a search as published has one ratio; let points be projected for a range of ratios.")


def depth_groups(space: str) -> int | None:
    """Return in how many groups of blocks the space ``space`` has variables of their own; None where every unit has one.

    The two variables of ``depth`` are of all blocks together.

    Raises:
        ConfigError: there is no such space.
    """
    if space == "per-layer":
        return None
    if space == DEPTH:
        return 1
    result = re.fullmatch(r"(?:5|types) ?x ?([1-9]\d*)", space)
    if result is None:
        raise ConfigError(f"space must be one of {', '.join(SPACES)}, or `types x N` with N depth groups; got {space!r}.")
    return int(result[1])

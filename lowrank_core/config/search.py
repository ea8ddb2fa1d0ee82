"""What a search tries, and by which rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lowrank_core.config.checks import check_choice, check_min, check_ratio
from lowrank_core.config.compression import CompressionConfig
from lowrank_core.errors import ConfigError

__all__ = ["MIN_LOSS", "OBJECTIVES", "PRUNERS", "SAMPLERS", "SPACES", "VARIABLES", "SearchConfig", "depth_groups"]

OBJECTIVES = ("kl", "perplexity", "bolaco")
SAMPLERS = ("gp", "tpe", "cmaes", "qmc", "random")
VARIABLES = ("kept", "errors")
PRUNERS = ("none", "wilcoxon")
MIN_LOSS = 1e-9
"""A loss below it has the logarithm of this one."""
SPACES = ("5x1", "5x4", "per-layer")
"""The usual spaces; ``types x N`` with any number N of depth groups is one, too."""


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
            of the errors that the allocator lagrangian trades: at 1 everywhere the point is lagrangian's own.
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
    max_ratio: float | None = None
    space: str = "5x1"
    variables: str = "keep_ratio"
    error_weights: bool = False
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
        check_min(1, trials=self.trials, startup_trials=self.startup_trials)
        check_min(0, seed=self.seed, top_k=self.top_k, confirmed=self.confirmed)
        depth_groups(self.space)
        check_choice("variables", self.variables, VARIABLES)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("pruner", self.pruner, PRUNERS)
        if self.max_ratio is not None:
            self._check_two_objectives(check_ratio(self.max_ratio))
        if not self.projected and self.variables != "kept":
            raise ConfigError(
                "a search as published has kept fractions for variables; choose variables `kept`, or let points be projected."
            )
        if self.variables == "keep_ratio" and (self.compression.stacks or self.compression.heads):
            raise ConfigError("kept fractions can't choose between single matrices and stacks or heads; choose variables `errors`.")
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

    Raises:
        ConfigError: there is no such space.
    """
    if space == "per-layer":
        return None
    result = re.fullmatch(r"(?:5|types) ?x ?([1-9]\d*)", space)
    if result is None:
        raise ConfigError(f"space must be one of {', '.join(SPACES)}, or `types x N` with N depth groups; got {space!r}.")
    return int(result[1])

"""Settings of a sensitivity measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank_core.config import CompressionConfig, check_choice
from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError
from lowrank_core.metrics import metric_named
from lowrank_core.metrics.stacks import Wrapper
from lowrank_core.parameters import STORAGES

__all__ = ["MODULE", "SCOPES", "TYPE", "SensitivityConfig", "coarse_first", "single_compression"]

MODULE, TYPE = "module", "type"
SCOPES = (TYPE, MODULE)


@dataclass(frozen=True)
class SensitivityConfig:
    """Settings of a sensitivity measurement."""

    kept: tuple[float, ...] = option(
        (0.2, 0.35, 0.5, 0.65, 0.8), "kept ratios of what is compressed, biases and index tables counted", label="Kept of the parameters"
    )
    scopes: tuple[str, ...] = option(SCOPES, "module: each matrix alone; type: all matrices of a type together", label="Compressed")
    kinds: tuple[str, ...] = option((), "module types, such as q_proj", label="Types", fallback="all")
    windows: int | None = option(
        None,
        "of the search-validation split, evenly spaced; fewer are faster, and noisier",
        label="Windows",
        minimum=1,
        fallback="all of the run",
    )
    basis: str = option("", "error metric of the factors; matrices are decomposed one by one", label="Error metric", fallback="the run's")
    storage: str = option("", "sets the rank at a kept ratio: pivoted factors need fewer parameters", label="Storage", fallback="the run's")

    def __post_init__(self) -> None:
        for name in ("kept", "scopes", "kinds"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ConfigError(f"{name} must be a list, got {values!r}.")
            object.__setattr__(self, name, tuple(values))  # JSON has lists
        if not self.kept:
            raise ConfigError("give at least one kept ratio, such as 0.5.")
        for ratio in self.kept:
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
                raise ConfigError(f"a kept ratio must lie between 0 and 1 (the fraction of parameters kept), got {ratio!r}. Try 0.5.")
        if not self.scopes or not set(self.scopes) <= set(SCOPES):
            raise ConfigError(f"scopes must be some of {', '.join(SCOPES)}; got {', '.join(map(str, self.scopes)) or 'none'}.")
        check_options(self)
        if self.basis:
            metric_named(self.basis)
        if self.storage:
            check_choice("storage", self.storage, STORAGES)


def coarse_first(ratios: Sequence[float]) -> tuple[float, ...]:
    """Return the ratios, the middle one first, then always the farthest from all before it (the smaller of two)."""
    left = sorted(set(ratios))
    result = [left.pop(len(left) // 2)] if left else []
    while left:
        # Rounded: 0.2 and 0.8 are equally far from 0.5, whatever their last bits say.
        farthest = max(left, key=lambda ratio: (round(min(abs(ratio - other) for other in result), 9), -ratio))
        left.remove(farthest)
        result.append(farthest)
    return tuple(result)


def single_compression(base: CompressionConfig, config: SensitivityConfig) -> CompressionConfig:
    """Return the factorisation of a single matrix: the inner metric, without stacks and heads.

    A matrix that is compressed alone has the dense model's input, so that there is no drift that a basis could correct.

    Raises:
        ConfigError: no such basis.
    """
    basis = metric_named(config.basis or base.basis)
    while isinstance(basis, Wrapper):
        basis = basis.inner
    storage = config.storage or base.storage
    if config.basis:  # shrinkage is of the run's own metric
        base = replace(base, input_shrinkage=0.0, gradient_shrinkage=0.0)
    return replace(base, basis=basis.name, storage=storage, value_dense=False, stacks=False, heads=False, modules=False, rank_multiple=1)

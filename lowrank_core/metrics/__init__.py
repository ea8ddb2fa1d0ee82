"""Error metrics: ways to weigh the error of a matrix, and so to order its directions. Torch-free; ``factorization`` does the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from lowrank_core.config import CompressionConfig
from lowrank_core.errors import ConfigError
from lowrank_core.metrics.activation_scaled import ACTIVATION_SCALED
from lowrank_core.metrics.base import ErrorMetric, Grouping, LayerData, Metric
from lowrank_core.metrics.drift_aware import DRIFT_AWARE, DriftAware
from lowrank_core.metrics.fisher_rows import FISHER_ROWS
from lowrank_core.metrics.pooled_feature import POOLED_FEATURE
from lowrank_core.metrics.refitted import REFITTED
from lowrank_core.metrics.stacks import CROSS_LAYER, DATA_FREE_JOINT, SHARED_INPUT, Wrapper, by_input
from lowrank_core.metrics.two_sided import TWO_SIDED, TWO_SIDED_HALF, TWO_SIDED_UNCENTRED, TwoSided
from lowrank_core.metrics.weight_svd import WEIGHT_SVD
from lowrank_core.metrics.whitened import WHITENED

__all__ = ["METRICS", "WRAPPERS", "ErrorMetric", "Grouping", "Metric", "LayerData", "metric_named", "metric_of", "by_input", "with_beta"]

_SINGLE: tuple[ErrorMetric, ...] = (
    *(POOLED_FEATURE, WEIGHT_SVD, FISHER_ROWS, ACTIVATION_SCALED, WHITENED),
    *(TWO_SIDED, TWO_SIDED_HALF, TWO_SIDED_UNCENTRED),
)

WRAPPERS: Mapping[str, Wrapper] = MappingProxyType({basis.title: basis for basis in (SHARED_INPUT, CROSS_LAYER, DRIFT_AWARE, REFITTED)})
"""Metrics around another one: ``shared_input:two_sided`` is one, ``shared_input`` alone wraps its default."""

METRICS: Mapping[str, ErrorMetric] = MappingProxyType({basis.name: basis for basis in (*_SINGLE, *WRAPPERS.values(), DATA_FREE_JOINT)})


def with_beta(basis: ErrorMetric, beta: float) -> ErrorMetric:
    """Return ``basis`` with β where it, or one that it wraps, is drift-aware."""
    if isinstance(basis, DriftAware):
        return replace(basis, beta=beta)
    return replace(basis, inner=with_beta(basis.inner, beta)) if isinstance(basis, Wrapper) else basis


def metric_of(config: CompressionConfig) -> ErrorMetric:
    """Return the metric that ``config`` asks for, with its β and its shrinkage.

    Raises:
        ConfigError: there is none, or it can't be shrunk: only a two-sided one can, and its inputs only where no drift is corrected.
    """
    result = with_beta(metric_named(config.basis), config.drift_beta)
    if config.input_shrinkage and result.sequential:
        raise ConfigError(f"{result.label} corrects drift, and then inputs can't be shrunk. Take input damping, or drop drift_aware.")
    return _shrunk(result, config) if config.input_shrinkage or config.gradient_shrinkage else result


def _shrunk(basis: ErrorMetric, config: CompressionConfig) -> ErrorMetric:
    if isinstance(basis, Wrapper):
        return replace(basis, inner=_shrunk(basis.inner, config))
    if not isinstance(basis, TwoSided):
        raise ConfigError(f"{basis.label} can't be shrunk, only a two-sided metric can. Take damping, or the basis two_sided.")
    return replace(basis, input_shrinkage=config.input_shrinkage, gradient_shrinkage=config.gradient_shrinkage)


def metric_named(name: str) -> ErrorMetric:
    """Return the basis ``name``: an entry of ``METRICS``, or wrappers around one, joined by colons.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    outer, colon, inner = name.partition(":")
    if outer not in METRICS or (colon and outer not in WRAPPERS):
        around = ", ".join(WRAPPERS)
        raise ConfigError(
            f"basis must be one of {', '.join(METRICS)}, or one of {around} around another (shared_input:two_sided); got {name!r}."
        )
    return replace(WRAPPERS[outer], inner=metric_named(inner)) if colon else METRICS[outer]

"""Damping and β chosen on validation text: what the formulas leave open, measured instead of guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.truncations import perplexities_for
from lowrank_core.config import CompressionConfig
from lowrank_core.errors import NumericalError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle
from lowrank_core.runs import statistics_home
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.text import TokenWindows
from lowrank_core.types import Progress

__all__ = ["BETAS", "DAMPINGS", "TuningPoint", "tune"]

DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Of the output gradients' metric, relative to its mean eigenvalue."""

BETAS = (0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TuningPoint:
    """A setting, and the KL divergence that it left on validation text (nats per token); None where the model diverged."""

    gradient_damping: float
    drift_beta: float
    kl: float | None


@dataclass(frozen=True)
class _Bench:
    handle: ModelHandle
    statistics: LayerStatistics
    windows: TokenWindows
    dense: DenseReference
    allocator: str
    compression_ratio: float

    def measured(self, decomposed: Decomposed) -> TuningPoint:
        config = decomposed.config
        try:
            perplexities = perplexities_for(self.allocator, decomposed, self.windows.calibration, statistics_home())
            allocation = decomposed.allocate(self.allocator, self.compression_ratio, perplexities=perplexities)
            model = decomposed.compress(allocation, self.windows.calibration)
            scores, _ = score_windows(model.handle, self.windows.validation, dense=self.dense)
            assert scores.kl is not None
            return TuningPoint(config.gradient_damping, config.drift_beta, float(scores.kl.mean()))
        except NumericalError:
            return TuningPoint(config.gradient_damping, config.drift_beta, None)


def tune(
    handle: ModelHandle,
    statistics: LayerStatistics,
    config: CompressionConfig,
    windows: TokenWindows,
    *,
    allocator: str,
    compression_ratio: float,
    progress: Progress | None = None,
) -> tuple[CompressionConfig, tuple[TuningPoint, ...]]:
    """Return ``config`` with the gradient damping, then the β, of lowest KL on validation text, and all measurements.

    What the basis does not have (gradients, drift) is not tried. Test windows are not looked at.

    Raises:
        LowRankError: as ``decompose`` and ``Decomposed.allocate``; NumericalError also where the model diverged at every setting.
    """
    basis = metric_named(config.basis)
    dampings = DAMPINGS if basis.needs_gradients else (config.gradient_damping,)
    betas = tuple(sorted({*BETAS, config.drift_beta})) if basis.sequential else (config.drift_beta,)
    dense = DenseReference.compute(handle, windows.validation, batch_size=8)
    bench = _Bench(handle, statistics, windows, dense, allocator, compression_ratio)
    total, points = len(dampings) + len(betas) - 1, []
    for point in _points(bench, config, dampings, betas):
        points.append(point)
        if progress is not None:
            progress(len(points), total)
    best = _best(points)
    return replace(config, gradient_damping=best.gradient_damping, drift_beta=best.drift_beta), tuple(points)


def _points(bench: _Bench, config: CompressionConfig, dampings: tuple[float, ...], betas: tuple[float, ...]) -> Iterator[TuningPoint]:
    """Yield every damping at the last β, then the other β at the best damping."""
    tried: list[TuningPoint] = []
    chosen: Decomposed | None = None
    for damping in dampings:
        decomposed = decompose(bench.handle, bench.statistics, replace(config, gradient_damping=damping, drift_beta=betas[-1]))
        tried.append(bench.measured(decomposed))
        if tried[-1].kl is not None and _best(tried) is tried[-1]:
            chosen = decomposed
        yield tried[-1]
    if chosen is None:
        return  # nothing is left to go on from: the caller tells
    for beta in betas[:-1]:
        yield bench.measured(replace(chosen, config=replace(chosen.config, drift_beta=beta)))


def _best(points: list[TuningPoint]) -> TuningPoint:
    finite = [point for point in points if point.kl is not None]
    if not finite:
        raise NumericalError("the compressed model diverged at every setting that was tried. Lower the compression ratio.")
    return min(finite, key=lambda point: point.kl or 0.0)

"""Benchmark of decompositions: one wide matrix in the two-sided metric, next to the singular value decomposition of the same matrix."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from lowrank_core.catalogue import as_markdown
from lowrank_core.config import to_mapping
from lowrank_core.config.benchmarks import DecompositionBenchmark
from lowrank_core.decomposition.factorization import Damping, factorize_unit
from lowrank_core.metrics import LayerData, metric_named
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.statistics.moments import InputStatistics, OutputStatistics
from lowrank_core.types import Result

__all__ = ["benchmark"]

T = TypeVar("T")

_DAMPING = Damping()


@dataclass(frozen=True)
class DecompositionRow:
    """One shape: CPU seconds as ratios within this run.

    Attributes:
        shape: d_out x d_in.
        over_svd: CPU seconds of the singular value decomposition alone over those of the whole of ours.
        over_roots: those of that decomposition with the square roots of both metrics, over ours.
        largest_difference: of the errors at any rank, over the error at rank 0.
    """

    shape: str
    over_svd: float
    over_roots: float
    largest_difference: float


def benchmark(config: DecompositionBenchmark) -> Result:
    """Decompose each shape in turns with the direct way, and compare errors."""
    rows = []
    for d_out, d_in in config.pairs:
        rows.append(_row(d_out, d_in, config.turns))
        print(f"{rows[-1].shape}: done", file=sys.stderr, flush=True)
    return {"rows": [to_mapping(row) for row in rows], "text": _markdown(rows, config.turns)}


def _row(d_out: int, d_in: int, turns: int) -> DecompositionRow:
    given = _layer(d_out, d_in)
    unit, basis = Unit((given.shape,), "factored", adds_bias=True), metric_named("two_sided")
    direct, ours = [], []
    for _ in range(turns):
        (roots, svd), expected = _direct(given)
        direct.append((roots, svd))
        seconds, result = _timed(lambda: factorize_unit(unit, [given], basis, _DAMPING))
        ours.append(seconds)
    difference = float((result.errors - expected).abs().max() / expected[0])
    own = median(ours)
    return DecompositionRow(f"{d_out} x {d_in}", median(svd for _, svd in direct) / own, median(map(sum, direct)) / own, difference)


def _direct(given: LayerData) -> tuple[tuple[float, float], Tensor]:
    """Return CPU seconds of the roots and of the decomposition of P^½ W C^½, and the errors that it leaves."""
    assert given.outputs is not None
    seconds, (left, right, plain) = _timed(lambda: _roots(given))
    weighed = left @ given.weight
    taken, (directions, _, _) = _timed(lambda: torch.linalg.svd(weighed @ right, full_matrices=False))
    energies = (directions.T @ weighed @ plain).square().sum(1)
    tails = energies.flip(0).cumsum(0).flip(0)
    return (seconds, taken), 0.5 * torch.cat([tails, tails.new_zeros(1)])


def _roots(given: LayerData) -> tuple[Tensor, Tensor, Tensor]:
    assert given.outputs is not None
    left, _ = _root(given.outputs.gradient, _DAMPING.rows)
    return left, *_root(given.inputs.sample, _DAMPING.columns)


def _root(metric: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the symmetric roots of A + δI and of A."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=0)
    return (vectors * (values + damping * values.mean()).sqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def _layer(d_out: int, d_in: int) -> LayerData:
    """Return a random matrix whose metrics have spectra that fall as those of real layers do: λ_i ~ 1 / i."""
    generator = torch.Generator().manual_seed(0)

    def moment(width: int) -> Tensor:
        mixed = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
        scaled = mixed * torch.arange(1, width + 1, dtype=torch.float64).rsqrt()
        result: Tensor = scaled @ scaled.T
        return result

    columns, rows = moment(d_in), moment(d_out)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    mean = torch.zeros(d_in, dtype=torch.float64)
    inputs = InputStatistics(10 * d_in, mean, mean, columns, columns, one, one, one, one)
    shape = MatrixShape("layer", "layer", 0, d_out, d_in, False, "layer")
    return LayerData(shape, weight, None, inputs, OutputStatistics(10 * d_out, rows, rows.diagonal()))


def _markdown(rows: list[DecompositionRow], turns: int) -> str:
    table = as_markdown(
        {
            "matrix (out x in)": row.shape,
            "SVD alone over ours": f"{row.over_svd:.1f}",
            "SVD and roots over ours": f"{row.over_roots:.1f}",
            "largest difference of errors": f"{row.largest_difference:.1e}",
        }
        for row in rows
    )
    return f"CPU seconds, float64, median of {turns} turns; errors over the error at rank 0.\n\n{table}"

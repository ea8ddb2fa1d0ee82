"""Matrices with made-up inputs and output gradients, for tests of what follows from them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowrank_core.decomposition.factorization import Damping, FactorBasis, factorize_unit
from lowrank_core.layers.forms import Factors
from lowrank_core.metrics import LayerData, metric_named
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.statistics.moments import InputStatistics, OutputStatistics
from lowrank_core.statistics.pooling import PooledAccumulator

__all__ = ["applied", "factorized", "gradients", "inputs_of", "layer_data", "outputs_of", "random", "rows", "second_moment"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(width: int, *, tokens: int = 400, seed: int = 0, mean: float = 0.7) -> Tensor:
    """Return x (tokens, width) with a decaying spectrum and this mean."""
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -1.0
    rotation = torch.linalg.qr(random(width, width, seed=seed + 1)).Q
    x = (random(tokens, width, seed=seed) * scale) @ rotation
    return x - x.mean(0) + mean


def gradients(width: int, *, tokens: int = 400, seed: int = 50) -> Tensor:
    """Return g (tokens, width), some directions far larger than others."""
    return random(tokens, width, seed=seed) @ (
        torch.linalg.qr(random(width, width, seed=seed + 1)).Q * torch.logspace(0, -2, width).double()
    )


def inputs_of(x: Tensor) -> InputStatistics:
    """Return the statistics of x (tokens, n), in one group."""
    accumulator = PooledAccumulator("layer", x.shape[1], group_size=1, group_weights="equal")
    accumulator.update(x[None])
    return accumulator.finish()


def outputs_of(g: Tensor, x: Tensor) -> OutputStatistics:
    """Return the statistics of gradients g (tokens, m) at outputs of x (tokens, n)."""
    return OutputStatistics(len(g), g.T @ g / len(g), (g.square() * x.square().sum(1, keepdim=True)).mean(0))


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def layer_data(d_out: int, x: Tensor, *, name: str = "layer", bias: bool = False, seed: int = 11, g: Tensor | None = None) -> LayerData:
    """Return a random matrix with the statistics of its input x (tokens, n), and of gradients at its output."""
    d_in = x.shape[1]
    b = torch.linspace(-1, 1, d_out, dtype=torch.float64) if bias else None
    g = gradients(d_out, tokens=len(x), seed=seed + 70) if g is None else g
    return LayerData(MatrixShape(name, name, 0, d_out, d_in, bias), random(d_out, d_in, seed=seed), b, inputs_of(x), outputs_of(g, x))


def factorized(name: str, *operands: LayerData, damping: Damping | None = None, **changes: object) -> FactorBasis:
    """Decompose the operands together by the basis ``name``, with ``changes`` to its fields."""
    basis = replace(metric_named(name), **changes)  # type: ignore[type-var]
    return factorize_unit(Unit(tuple(o.shape for o in operands), "factored", basis.centred), operands, basis, damping or Damping())


def applied(factors: Factors, x: Tensor, member: int = 0) -> Tensor:
    y = x @ factors.down.T @ factors.ups[member].T
    bias = factors.biases[member]
    return y if bias is None else y + bias

"""Compressed layers against dense ones: how much of the saved arithmetic is saved time, and where the rest goes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_core.commands.benchmarks.speed_rows import TURNS, SpeedRow, seconds_in_turns
from lowrank_core.layers.forms import Factors, build_layers
from lowrank_core.layers.pivoted import PivotedLinear
from lowrank_core.parameters import MatrixShape, Unit
from lowrank_core.speed import Spread

__all__ = ["layer_rows", "verdict"]

SHAPES = (
    ((256,), 256),
    ((1024,), 1024),
    ((2048,), 2048),
    ((4096,), 1024),
    ((1024,), 4096),
    ((1024, 1024, 1024), 1024),
    ((2048, 512, 512), 2048),
)
"""(rows of the matrices that read one input, columns); three matrices are a stack, as q, k and v."""

PHASES = (("prefill", (1, 512)), ("decode", (1, 1)), ("decode", (8, 1)))
"""(phase, (sequences, tokens of each) that are read at once)."""

RATIOS = (0.2, 0.4, 0.6)
_REST = {"factored": "calling the layer takes", "pivoted": "gathering rows and calling the layer take"}
_NOTABLE = 0.05
"""Smaller shares of time are not reported."""
_EQUAL = 0.02
"""Ratios within this of 1 are as fast."""


@dataclass(frozen=True)
class _Subject:
    """A unit at a rank, compressed and dense: modules and the products in them."""

    storage: str
    ratio: float
    unit: Unit
    rank: int
    layers: tuple[nn.Module, ...]
    weights: tuple[Tensor, ...]
    down: Tensor
    seconds: tuple[Tensor, ...]

    @classmethod
    def made(cls, rows: Sequence[int], columns: int, storage: str, ratio: float, like: Tensor) -> _Subject:
        """Draw weights and factors; ``like`` gives dtype and device."""
        names = [f"layer{index}" for index in range(len(rows))]
        unit = Unit(tuple(MatrixShape(name, "layer", 0, d_out, columns) for name, d_out in zip(names, rows, strict=True)), storage)
        rank = unit.rank_for_parameters((1 - ratio) * unit.dense_parameters)
        assert rank is not None
        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int) -> Tensor:
            values: Tensor = torch.randn(size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5
            return values

        weights = tuple(drawn(d_out, columns).to(like) for d_out in rows)
        factors = Factors(tuple(drawn(d_out, rank) for d_out in rows), drawn(rank, columns), (None,) * len(rows))
        layers = tuple(build_layers(names, factors, storage, weights).values())
        own = [layer.own if isinstance(layer, PivotedLinear) else 0 for layer in layers]
        seconds = tuple(drawn(d_out - pivots, rank).to(like) for d_out, pivots in zip(rows, own, strict=True))
        return cls(storage, ratio, unit, rank, layers, weights, factors.down.to(like), seconds)

    def compressed(self, x: Tensor) -> None:
        for layer in self.layers:
            layer(x)

    def products(self, x: Tensor) -> None:
        """Multiply as ``compressed`` does, and do nothing else."""
        reduced = nn.functional.linear(x, self.down)
        for second in self.seconds:
            nn.functional.linear(reduced, second)

    def dense(self, x: Tensor) -> None:
        for weight in self.weights:
            nn.functional.linear(x, weight)

    @property
    def expected(self) -> float:
        return self.unit.flops_per_token(self.rank) / self.unit.flops_per_token(None)


def layer_rows(device: torch.device, dtype: torch.dtype) -> Iterator[SpeedRow]:
    """Yield a row for every shape, storage, ratio and phase; one that is not faster than dense says why."""
    like = torch.empty(0, device=device, dtype=dtype)
    for rows, columns in SHAPES:
        for storage in ("factored", "pivoted"):
            for ratio in RATIOS:
                subject = _Subject.made(rows, columns, storage, ratio, like)
                for phase, size in PHASES:
                    yield _row(subject, phase, size)
        print(f"layers {_named(rows, columns)}: done", file=sys.stderr, flush=True)


@torch.no_grad()
def _row(subject: _Subject, phase: str, size: tuple[int, int]) -> SpeedRow:
    members = [member.d_out for member in subject.unit.members]
    x = torch.randn(*size, subject.unit.d_in, generator=torch.Generator().manual_seed(1)).to(subject.weights[0])
    seconds = seconds_in_turns(*(partial(action, x) for action in (subject.compressed, subject.products, subject.dense)))
    ratio = Spread.of(ours / dense for ours, _, dense in seconds)
    products = Spread.of(bare / dense for _, bare, dense in seconds).median
    stack, tokens = len(members) > 1, size[0] * size[1]
    return SpeedRow(
        what=f"{subject.storage} {'stack' if stack else 'layer'}, {phase}",
        against="the dense layers" if stack else "the dense layer",
        detail=f"{_named(members, subject.unit.d_in)}, ratio {subject.ratio:g} (rank {subject.rank}), {tokens} token{'s' * (tokens > 1)}",
        ratio=ratio.median,
        low=ratio.low,
        high=ratio.high,
        turns=TURNS,
        expected=subject.expected,
        products=products,
        verdict=verdict(ratio, products, subject.expected, subject.storage),
    )


def _named(rows: Sequence[int], columns: int) -> str:
    return f"{' + '.join(map(str, rows))} x {columns}"


def verdict(ratio: Spread, products: float, expected: float, storage: str) -> str:
    """Say in words whether a layer is faster than the dense one, and if not, what was measured to take the time.

    Args:
        ratio: of its time to that of the dense layer.
        products: the same for its matrix products alone.
        expected: ratio of the FLOPs.
    """
    doubt = ", though not in every turn" if ratio.low < 1 <= ratio.high else ""
    if abs(ratio.median - 1) <= _EQUAL:
        return "as fast as dense"
    if ratio.median < 1:
        return f"faster{doubt}"
    reasons = []
    if expected < (1 - _NOTABLE) * products:
        rate = expected / products
        reasons.append(f"its products alone take {products:.2f} of the dense time ({rate:.0%} of its rate)")
    rest = 1 - products / ratio.median
    if rest > _NOTABLE:
        reasons.append(f"{_REST[storage]} {rest:.0%} of its time")
    why = f": {', and '.join(reasons)}" if reasons else ""
    return f"slower by {ratio.median - 1:.0%}{doubt}{why}"

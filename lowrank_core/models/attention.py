"""Value and output projections of attention: traced in one forward pass, verified by another, not guessed from names.

Notation::

    V_g (d, n), b_g (d,)    value rows and bias of group g;   O_h (m, d)   output columns of head h, which reads group g
    T_g (d, d)              a random gauge of group g: if V, b, O are a head unit, T_g V_g, T_g b_g and O_h T_g⁻¹ give the same model
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_core.models.handle import ModelHandle, bias_of, blocks_of, random_tokens, weight_of
from lowrank_core.models.unrolled import replace_module
from lowrank_core.models.values import head_dim_of, value_reads
from lowrank_core.parameters import HeadUnit, MatrixShape

__all__ = ["DroppedHeads", "Heads", "find_heads", "head_units", "logit_gap", "logits_of", "tolerance_of"]

_WINDOWS = 2
_SEED = 0


@dataclass(frozen=True)
class DroppedHeads:
    """A pair of layers that looked like value and output projection, and is none; ``reason`` in words."""

    value: str
    output: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} and {self.output} are not compressed by heads: {self.reason}."


@dataclass(frozen=True)
class Heads:
    """Verified per-head units, and rejected candidates."""

    units: tuple[HeadUnit, ...]
    dropped: tuple[DroppedHeads, ...]

    def describe(self) -> dict[str, object]:
        """Return both, ready for JSON."""
        return {"heads": [unit.describe() for unit in self.units], "heads_dropped": [str(entry) for entry in self.dropped]}


def head_units(handle: ModelHandle) -> tuple[HeadUnit, ...]:
    """Return the units of ``find_heads``."""
    return find_heads(handle).units


def find_heads(handle: ModelHandle) -> Heads:
    """Return each block's value and output projection as one unit, where the architecture has them apart and joins them plainly.

    A value that several layers read is none, nor is a pair whose gauge can't be turned: the model must stay what it is, on two windows.
    """
    shapes = {shape.name: shape for shape in handle.shapes}
    depths = {shape.name: shape.depth for shape in handle.shapes if shape.expert is None}
    ids = random_tokens(handle.module, 1)[:, :2]
    reads = [(read.reader, read.value) for read in value_reads(handle.module, *blocks_of(handle.module), depths, ids)]
    values = Counter(value for _, value in reads)
    read = Counter(output for output, _ in reads)
    plain, dropped = [], []
    for output, value in reads:
        if output not in shapes:
            continue
        if values[value] > 1:
            dropped.append(DroppedHeads(value, output, f"{values[value]} layers read the value"))
        elif read[output] > 1:
            dropped.append(DroppedHeads(value, output, f"{read[output]} layers give the same value"))
        else:
            plain.append(_unit(shapes[value], shapes[output], head_dim_of(handle.module, shapes[value].depth) or 1))
    kept, failed = _verified(handle, plain)
    return Heads(kept, (*dropped, *failed))


def _unit(value: MatrixShape, output: MatrixShape, head_dim: int) -> HeadUnit:
    return HeadUnit((value, output), heads=output.d_in // head_dim, groups=value.d_out // head_dim, head_dim=head_dim)


def _verified(handle: ModelHandle, units: Sequence[HeadUnit]) -> tuple[tuple[HeadUnit, ...], list[DroppedHeads]]:
    """Return the units whose gauge can be turned, and the others: all at once, and one by one only where that changes the model."""
    if not units:
        return (), []
    ids = random_tokens(handle.module, _WINDOWS, seed=_SEED)
    dense = logits_of(handle, ids)
    if logit_gap(_turned_logits(handle, units, ids), dense) <= tolerance_of(handle):
        return tuple(units), []
    gaps = [logit_gap(_turned_logits(handle, [unit], ids), dense) for unit in units]
    kept = tuple(unit for unit, gap in zip(units, gaps, strict=True) if gap <= tolerance_of(handle))
    dropped = [
        DroppedHeads(unit.members[0].name, unit.members[1].name, f"turned at full rank, the logits change by {gap:.2g} of their deviation")
        for unit, gap in zip(units, gaps, strict=True)
        if not gap <= tolerance_of(handle)
    ]
    return kept, dropped


def tolerance_of(handle: ModelHandle) -> float:
    """Half of the digits: the gauge itself is exact in every dtype, so that only the order of sums differs."""
    return math.sqrt(torch.finfo(handle.module.dtype).eps)


def logit_gap(logits: Tensor, dense: Tensor) -> float:
    """Return the root mean square change of the logits, in their standard deviations."""
    return float((logits - dense).square().mean().sqrt() / dense.std())


@torch.no_grad()
def logits_of(handle: ModelHandle, ids: Tensor) -> Tensor:
    logits: Tensor = handle.module(input_ids=ids, use_cache=False).logits
    return logits.float()


def _turned_logits(handle: ModelHandle, units: Sequence[HeadUnit], ids: Tensor) -> Tensor:
    """Return the logits with the gauges of ``units`` turned; the layers are afterwards what they were."""
    generator = torch.Generator().manual_seed(_SEED)
    turned: dict[str, nn.Module] = {}
    for unit in units:
        turned |= _turned(handle, unit, generator)
    dense = {name: handle.module.get_submodule(name) for name in turned}
    try:
        for name, layer in turned.items():
            replace_module(handle.module, name, layer)
        return logits_of(handle, ids)
    finally:
        for name, layer in dense.items():
            replace_module(handle.module, name, layer)


def _turned(handle: ModelHandle, unit: HeadUnit, generator: torch.Generator) -> Mapping[str, nn.Module]:
    """Return the two layers with a random gauge between them.

    T_g is a permutation with signs and factors of ½, 1 and 2: no other map commutes with it but a multiple of one (nor does a norm, or
    a gate of the values), its condition is 4, and products with it and its inverse are exact in every dtype.
    """
    value, output = (handle.module.get_submodule(member.name) for member in unit.members)
    rows, scales = _gauge(unit, generator)
    rows, scales = rows.to(handle.device), scales.to(handle.device, weight_of(value).dtype)
    bias = bias_of(value)
    turned_value = _linear(weight_of(value)[rows.flatten()] * scales.flatten()[:, None], bias, value)
    if bias is not None:
        turned_value.bias = nn.Parameter(bias[rows.flatten()] * scales.flatten(), requires_grad=False)
    per_group = unit.heads // unit.groups
    columns = torch.arange(unit.heads, device=rows.device)[:, None] * unit.head_dim + (rows % unit.head_dim).repeat_interleave(per_group, 0)
    back = scales.repeat_interleave(per_group, 0).flatten()
    turned_output = _linear(weight_of(output)[:, columns.flatten()] / back, bias_of(output), output)
    return {unit.members[0].name: turned_value, unit.members[1].name: turned_output}


def _gauge(unit: HeadUnit, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return for every dimension of each group (groups, d) the row that it takes, and its factor."""
    dim = unit.head_dim
    rows = torch.stack([group * dim + torch.randperm(dim, generator=generator) for group in range(unit.groups)])
    powers = torch.randint(-1, 2, (unit.groups, dim), generator=generator)
    signs = 2 * torch.randint(0, 2, (unit.groups, dim), generator=generator) - 1
    return rows, signs * 2.0**powers


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Module) -> nn.Linear | Conv1D:
    """Return a layer of the kind of ``like`` with another matrix."""
    with torch.device("meta"):
        d_out, d_in = weight.shape
        layer: nn.Linear | Conv1D = Conv1D(d_out, d_in) if isinstance(like, Conv1D) else nn.Linear(d_in, d_out, bias=bias is not None)
    layer.weight = nn.Parameter((weight.T if isinstance(like, Conv1D) else weight).contiguous(), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return layer

"""Modules with fewer channels: MoDeGPT, arXiv 2408.09632, Algorithms 1 and 2 (its third, values and outputs, is in ``head_factorization``).

Notation::

    C (d, d)     E[h hᵀ] of the last layer's input h = act(gate)·up (or act(up)), per token;  W_d (m, d) that layer
    s_j          [C (C + λI)⁻¹]_jj, the ridge leverage of channel j, λ = ``RIDGE`` x the mean eigenvalue of C
    P            the channels by falling s_j;  J = P[:k]
    W_d C_{:J} C_JJ⁻¹    the last layer behind J (Nyström);  with P C Pᵀ = L Lᵀ it is (W_d Pᵀ L)[:, :k] L[:k, :k]⁻¹, nested in k
    e_k          Σ_{j≥k} ‖(W_d Pᵀ L)_{:j}‖²: the mean squared error of the output

    q_h, k_g     E[q_i²] (d,) of query head h and of the key of its group g, before the rotary embedding
    s_p          √(Σ_{h∈g} Σ_{i∈p} q_{h,i} k_{g,i}) of a pair p of dimensions: the norms of CR, of two columns and of the heads of a group
    e_k          Σ_g Σ_{p not kept} s_p²

C is damped by δ before it is inverted; e_k counts that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.decomposition.factorization import Damping, check_finite, check_rank, tail_sums
from lowrank_core.layers.forms import PairFactors, WidthFactors
from lowrank_core.linalg import Damped
from lowrank_core.metrics import LayerData
from lowrank_core.parameters import PairUnit, WidthUnit

__all__ = ["RIDGE", "PairBasis", "WidthBasis", "reduce_pairs", "reduce_width"]

RIDGE = 1e-2
"""λ, relative to the mean eigenvalue of C."""


@dataclass(frozen=True)
class WidthBasis:
    """An MLP's layers at every width.

    Attributes:
        unit: its layers, and their prices.
        order: P (d,), channels by falling leverage.
        firsts: rows of each first layer in that order (d, n), float64, or float32 where they were stored, as are the next two.
        outputs: W_d Pᵀ L (m, d); lower: L (d, d).
        biases: of the first layers, in that order (d,), or None; last_bias: (m,), or None.
        errors: e_0 … e_d (d + 1,), descending.
        damping: δ; condition: of C before.
    """

    unit: WidthUnit
    order: Tensor
    firsts: tuple[Tensor, ...]
    outputs: Tensor
    lower: Tensor
    biases: tuple[Tensor | None, ...]
    last_bias: Tensor | None
    errors: Tensor
    damping: float
    condition: float

    @property
    def max_rank(self) -> int:
        return len(self.order)

    def slice(self, rank: int) -> WidthFactors:
        """Return the layers at ``rank`` channels, in the order of the model.

        Raises:
            RankError: rank outside [1, width].
        """
        check_rank(self.unit, rank, self.max_rank)
        place = self.order[:rank].argsort()
        corner, outputs = self.lower[:rank, :rank].to(torch.float64), self.outputs[:, :rank].to(torch.float64)
        last = torch.linalg.solve_triangular(corner, outputs, upper=False, left=False)
        firsts = [first[:rank][place].to(torch.float64) for first in self.firsts]
        biases = [None if bias is None else bias[:rank][place] for bias in self.biases]
        return WidthFactors(tuple(zip(firsts, biases, strict=True)), (last[:, place], self.last_bias))


def reduce_width(unit: WidthUnit, operands: Sequence[LayerData], damping: Damping) -> WidthBasis:
    """Order the channels of an MLP, and fit its last layer to every number of them; all float64.

    Raises:
        NumericalError: NaN, Inf, or a singular moment that is not damped; names the layer.
    """
    for operand in operands:
        check_finite(operand)
    *firsts, last = operands
    moment = Damped.of(last.inputs.second_moment, damping.columns, last.shape.name).invertible()
    order = leverages(moment.plain, last.shape.name).argsort(descending=True, stable=True)
    ordered = Damped(moment.plain[order][:, order], moment.added, 1.0, last.shape.name)
    lower = _triangular(ordered)
    outputs = last.weight[:, order] @ lower
    return WidthBasis(
        unit=unit,
        order=order,
        firsts=tuple(first.weight[order] for first in firsts),
        outputs=outputs,
        lower=lower,
        biases=tuple(None if first.bias is None else first.bias[order] for first in firsts),
        last_bias=last.bias,
        errors=tail_sums(outputs.square().sum(0)),
        damping=moment.added,
        condition=moment.condition,
    )


def leverages(moment: Tensor, name: str) -> Tensor:
    """Return s (d,) of a moment C (d, d)."""
    ridged = Damped.of(moment, RIDGE, name)
    return 1 - ridged.added * ridged.inverse.diagonal()


def _triangular(moment: Damped) -> Tensor:
    """Return L with L Lᵀ = C + δI, also where rounding lets no more than its symmetric root be trusted."""
    factor = moment.factor
    if torch.equal(factor, factor.tril()):
        return factor
    upper: Tensor = torch.linalg.qr(factor.T).R  # F Fᵀ = Rᵀ R
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
    return upper.T * signs


@dataclass(frozen=True)
class PairBasis:
    """Query and key projections with every number of pairs of dimensions.

    Attributes:
        unit: the two, and their prices.
        order: (groups, pairs), by falling score.
        query, key: weights (heads or groups, size, pairs, n), float64, or float32 where they were stored.
        query_bias, key_bias: (heads or groups, size, pairs), or None.
        errors: e_0 … e_d (pairs + 1,), descending.
        damping, condition: 0 and 1, as nothing is inverted.
    """

    unit: PairUnit
    order: Tensor
    query: Tensor
    key: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    errors: Tensor
    damping: float = 0.0
    condition: float = 1.0

    @property
    def max_rank(self) -> int:
        return self.unit.max_rank

    def slice(self, rank: int) -> PairFactors:
        """Return the layers with ``rank`` pairs in each head.

        Raises:
            RankError: rank outside [1, pairs].
        """
        check_rank(self.unit, rank, self.max_rank)
        kept = self.order[:, :rank].sort(dim=1).values
        query, key = (
            (_picked(weight.to(torch.float64), kept), None if bias is None else _picked(bias[..., None], kept)[..., 0])
            for weight, bias in ((self.query, self.query_bias), (self.key, self.key_bias))
        )
        return PairFactors(kept, query, key, self.unit.head_dim, self.unit.pair)


def _picked(values: Tensor, kept: Tensor) -> Tensor:
    """Return (heads, size, p, n) of (heads, size, pairs, n): the pairs ``kept`` (groups, p) of each head's group."""
    own = kept.repeat_interleave(len(values) // len(kept), 0)[:, None, :, None]
    return values.gather(2, own.expand(-1, values.shape[1], -1, values.shape[3]))


def reduce_pairs(unit: PairUnit, query: LayerData, key: LayerData) -> PairBasis:
    """Order the pairs of dimensions of each group of heads; all float64.

    Raises:
        NumericalError: NaN or Inf; names the layer.
    """
    for operand in (query, key):
        check_finite(operand)
    energies = [_by_pairs(unit, _energies(operand)[:, None])[..., 0] for operand in (query, key)]  # (heads or groups, size, pairs)
    shared = energies[0].reshape(unit.groups, -1, *energies[0].shape[1:]) * energies[1][:, None]
    scores = shared.sum((1, 2))  # s², (groups, pairs)
    biases = [None if each.bias is None else _by_pairs(unit, each.bias[:, None])[..., 0] for each in (query, key)]
    return PairBasis(
        unit=unit,
        order=scores.argsort(dim=1, descending=True, stable=True),
        query=_by_pairs(unit, query.weight),
        key=_by_pairs(unit, key.weight),
        query_bias=biases[0],
        key_bias=biases[1],
        errors=tail_sums(scores.sort(dim=1, descending=True).values.sum(0)),
    )


def _energies(operand: LayerData) -> Tensor:
    """Return E[y²] (d_out,) of a layer's outputs."""
    weight, moment = operand.weight, operand.inputs.second_moment
    linear = ((weight @ moment) * weight).sum(1)
    if operand.bias is None:
        return linear
    return linear + operand.bias * (2 * (weight @ operand.inputs.mean) + operand.bias)


def _by_pairs(unit: PairUnit, rows: Tensor) -> Tensor:
    """Return rows (heads · head_dim, n) as (heads, size, pairs, n)."""
    heads = rows.reshape(-1, unit.head_dim, rows.shape[-1])
    if unit.pair == "neighbours":
        return heads.reshape(len(heads), unit.max_rank, unit.size, -1).transpose(1, 2)
    return heads.reshape(len(heads), unit.size, unit.max_rank, -1)

"""Value and output projections of an attention, each head reduced to fewer value dimensions.

Notation::

    V_g (d, n)   value rows of group g, d = head_dim;   O_h (m, d)   output columns of head h, which reads group g
    K_h (d, d)   column metric of the output projection's input, the block of head h;  K_g their mean over the heads of g
    P (m, m)     damped row metric of the output projection
    F_h (d, d)   O_hᵀ P O_h
    R Rᵀ         K_g, damped
    Q Σ² Qᵀ      of Rᵀ Σ_h∈g F_h R
    V'_g = Q_rᵀ R⁻¹ V_g,   O'_h = O_h R Q_r

docs/methods.md §4 takes V_g S V_gᵀ for K; measured behind the attention, K_h also knows what averaging over tokens did to the values.
MoDeGPT (arXiv 2408.09632, Algorithm 3) has K = V_g S V_gᵀ, P = I, and for heads that share their values I in the place of Σ F_h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_core.decomposition.factorization import Damping, check_finite, check_rank, isotonic_upper_bound, row_metric
from lowrank_core.layers.forms import HeadFactors
from lowrank_core.linalg import Damped, principal_directions, times
from lowrank_core.metrics import ErrorMetric, LayerData
from lowrank_core.parameters import HeadUnit

__all__ = ["HeadBasis", "factorize_heads", "reduce_heads"]


@dataclass(frozen=True)
class HeadBasis:
    """Nested per-head factors.

    Attributes:
        unit: the value and the output projection, and their prices.
        values: V'_g (groups, d, n), float64, or float32 where they were stored, as are the outputs (``slice`` gives float64).
        value_biases: of the reduced values (groups, d), or None.
        outputs: O'_h (heads, m, d).
        output_bias: b (m,) of the dense output projection, or None.
        output_mean: W_o μ (m,) for a centred basis, else None; reduced_mean: mean of the reduced values (heads, d).
        errors: e_0 … e_d (d + 1,), descending.
        damping: largest δ added to a K_g; condition: largest condition of a K_g.
    """

    unit: HeadUnit
    values: Tensor
    value_biases: Tensor | None
    outputs: Tensor
    output_bias: Tensor | None
    output_mean: Tensor | None
    reduced_mean: Tensor | None
    errors: Tensor
    damping: float
    condition: float

    @property
    def max_rank(self) -> int:
        return self.unit.head_dim

    def slice(self, rank: int) -> HeadFactors:
        """Return the factors at ``rank`` dimensions for each head.

        Raises:
            RankError: rank outside [1, head_dim].
        """
        check_rank(self.unit, rank, self.max_rank)
        biases = None if self.value_biases is None else self.value_biases[:, :rank]
        outputs = self.outputs[:, :, :rank].to(torch.float64)
        return HeadFactors(self.values[:, :rank].to(torch.float64), biases, outputs, self._bias_at(outputs, rank), self.unit.head_dim)

    def _bias_at(self, outputs: Tensor, rank: int) -> Tensor | None:
        if self.output_mean is None or self.reduced_mean is None:
            return self.output_bias
        correction = self.output_mean - torch.einsum("hmr,hr->m", outputs, self.reduced_mean[:, :rank])
        return correction if self.output_bias is None else self.output_bias + correction


def factorize_heads(unit: HeadUnit, value: LayerData, output: LayerData, basis: ErrorMetric, damping: Damping) -> HeadBasis:
    """Decompose each group of heads; all float64.

    Raises:
        NumericalError: NaN, Inf, or no convergence; names the layer.
    """
    metric = basis.metric(output)
    moments = _head_moments(metric.columns, value, unit)  # (heads, d, d)
    grams = _grams(unit, output, row_metric(metric, damping, output.shape.name))
    result = _decomposed(unit, value, output, (moments, grams, grams), damping, centred=basis.centred)
    return replace(result, errors=result.errors * metric.scale)


def reduce_heads(unit: HeadUnit, value: LayerData, output: LayerData, damping: Damping) -> HeadBasis:
    """Decompose each group of heads as MoDeGPT does; all float64. Where several heads read a value, its directions are those of it alone.

    Raises:
        NumericalError: NaN, Inf, or no convergence; names the layer.
    """
    parts = value.weight.reshape(unit.groups, unit.head_dim, -1)
    moments = (parts @ value.inputs.second_moment @ parts.transpose(1, 2)).repeat_interleave(unit.heads // unit.groups, dim=0)
    grams = _grams(unit, output, None)
    weights = grams if unit.heads == unit.groups else torch.eye(unit.head_dim, dtype=grams.dtype).expand_as(grams)
    return _decomposed(unit, value, output, (moments, weights, grams), damping)


def _grams(unit: HeadUnit, output: LayerData, rows: Damped | None) -> Tensor:
    """Return F_h (heads, d, d)."""
    projections = output.weight.reshape(-1, unit.heads, unit.head_dim).transpose(0, 1)  # (heads, m, d)
    return torch.stack([part.T @ (part if rows is None else times(rows.matrix, part)) for part in projections])


def _decomposed(
    unit: HeadUnit,
    value: LayerData,
    output: LayerData,
    metrics: tuple[Tensor, Tensor, Tensor],
    damping: Damping,
    *,
    centred: bool = False,
) -> HeadBasis:
    """Return the factors of each group by K_h, what weighs directions, and F_h, which weighs errors (heads, d, d each)."""
    check_finite(value)
    check_finite(output)
    moments, weights, grams = metrics
    heads, groups, dim = unit.heads, unit.groups, unit.head_dim
    per_group = heads // groups
    projections = output.weight.reshape(-1, heads, dim).transpose(0, 1)  # (heads, m, d)
    values, outputs, biases, mixes, damped = [], [], [], [], []
    for group in range(groups):
        own = slice(group * per_group, (group + 1) * per_group)
        inner = Damped.of(moments[own].mean(0), damping.columns, unit.name).invertible()
        half = inner.transposed_times(inner.transposed_times(weights[own].sum(0)).T)
        _, directions = principal_directions(half, unit.name)
        reduce = inner.inverse_transposed_times(directions).T  # (d, d): the first r rows; of restore the first r columns
        restore = times(inner.factor, directions)
        values.append(reduce @ value.weight[group * dim : (group + 1) * dim])
        outputs.append(projections[own] @ restore)
        biases.append(None if value.bias is None else reduce @ value.bias[group * dim : (group + 1) * dim])
        mixes += [(reduce, restore)] * per_group
        damped.append(inner)
    return HeadBasis(
        unit=unit,
        values=torch.stack(values),
        value_biases=None if value.bias is None else torch.stack([bias for bias in biases if bias is not None]),
        outputs=torch.cat(outputs),
        output_bias=output.bias,
        output_mean=output.weight @ output.inputs.mean if centred else None,
        reduced_mean=_reduced_means(output.inputs.mean, mixes) if centred else None,
        errors=_errors(grams, moments, mixes),
        damping=max(inner.added for inner in damped),
        condition=max(inner.condition for inner in damped),
    )


def _head_moments(columns: Tensor | None, value: LayerData, unit: HeadUnit) -> Tensor:
    """Return K_h (heads, d, d); without data, that of values of white inputs."""
    heads, groups, dim = unit.heads, unit.groups, unit.head_dim
    if columns is None:
        rows = value.weight.reshape(groups, dim, -1)
        return (rows @ rows.transpose(1, 2)).repeat_interleave(heads // groups, dim=0)
    if columns.ndim == 1:
        return torch.diag_embed(columns.reshape(heads, dim))
    return torch.stack([columns[h * dim : (h + 1) * dim, h * dim : (h + 1) * dim] for h in range(heads)])


def _reduced_means(mean: Tensor, mixes: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([reduce @ part for (reduce, _), part in zip(mixes, mean.reshape(len(mixes), -1), strict=True)])


def _errors(grams: Tensor, moments: Tensor, mixes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ_h tr(F_h (I - D_r) K_h (I - D_r)ᵀ) for r = 0 … d, D_r the projection that r dimensions leave."""
    dim = moments.shape[-1]
    curves = moments.new_zeros(dim + 1)
    for gram, moment, (reduce, restore) in zip(grams, moments, mixes, strict=True):
        for rank in range(dim + 1):
            gone = torch.eye(dim, dtype=gram.dtype) - restore[:, :rank] @ reduce[:rank]
            curves[rank] += ((gram @ gone) * (gone @ moment)).sum()
    curves[-1] = 0.0
    return isotonic_upper_bound(curves)

"""From a metric to nested factors: one decomposition serves every rank.

Notation (metrics.base has the rest)::

    L_i      (P_i + δI)^(γ/2) of member i,  R = (C + δI)^½  with C the mean of the members' C_i (the directions are those of their sum)
    T_i      W_i, or W_i + W_i (K_i - C_i)(C + δI)⁻¹ = W_i (K_i + δI)(C + δI)⁻¹ for a basis that corrects drift
    U Σ Vᵀ   of the stacked [L_1 T_1; L_2 T_2; …] R
    B, A     B_i = L_i⁻¹ U_i (m_i, k),  A = Uᵀ [L_1 T_1; …] (k, n):  W_r = B[:, :r] A[:r]
    e_r      Σ_i ‖L_i (T_i - W_{i,r}) C_i^½‖², each member in its own metric and without the damping of C;  e_k = 0
             (with one C: Σ_{j>r} ‖row j of Uᵀ [L_1 T_1; …] C^½‖²)

A comes from the projection Uᵀ, not from Σ Vᵀ R⁻¹: no inverse of C is needed, and full rank is lossless whatever C is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.decomposition.refitting import refitted
from lowrank_core.errors import ConfigError, NumericalError, RankError
from lowrank_core.layers.forms import Factors
from lowrank_core.linalg import Root, damped_root, invertible, svd
from lowrank_core.metrics import ErrorMetric, LayerData
from lowrank_core.metrics.base import Metric
from lowrank_core.parameters import Unit

__all__ = ["Damping", "FactorBasis", "check_finite", "isotonic_upper_bound", "factorize_unit", "refit_unit", "tail_sums"]


@dataclass(frozen=True)
class Damping:
    """Relative to the mean eigenvalue: of the column metric C, and of the row metric P."""

    columns: float = 1e-6
    rows: float = 1e-2


@dataclass(frozen=True)
class FactorBasis:
    """Nested factors of one unit.

    Attributes:
        unit: its matrices and prices.
        ups: B_i (m_i, k) of each member, float64.
        down: A (k, n), float64.
        biases: b_i (m_i,) of the dense members, or None.
        means: of each member, mean of the dense output without bias (m_i,) and mean of the input (n,); empty unless centred.
        errors: e_0 … e_k (k + 1,), float64, descending.
        damping: δ that was added to the column metric.
        condition: of the column metric before; infinite where it is singular.
    """

    unit: Unit
    ups: tuple[Tensor, ...]
    down: Tensor
    biases: tuple[Tensor | None, ...]
    means: tuple[tuple[Tensor, Tensor], ...]
    errors: Tensor
    damping: float
    condition: float

    @property
    def max_rank(self) -> int:
        return self.down.shape[0]

    def slice(self, rank: int) -> Factors:
        """Return the factors at ``rank``.

        Raises:
            RankError: rank outside [1, max_rank].
        """
        check_rank(self.unit, rank, self.max_rank)
        ups = tuple(up[:, :rank] for up in self.ups)
        return Factors(ups, self.down[:rank], tuple(self._bias_at(index, up, self.down[:rank]) for index, up in enumerate(ups)))

    def _bias_at(self, index: int, up: Tensor, down: Tensor) -> Tensor | None:
        """Return b + E[W x] - B_r A_r μ: the mean output stays exact (docs/methods.md §1, Centring)."""
        if not self.means:
            return self.biases[index]
        output_mean, input_mean = self.means[index]
        correction = output_mean - up @ (down @ input_mean)
        bias = self.biases[index]
        return correction if bias is None else bias + correction


def check_rank(unit: Unit, rank: int, limit: int) -> None:
    if not 1 <= rank <= limit:
        raise RankError(f"{unit.name}: rank must be in [1, {limit}], got {rank}. Lower it, or leave the layer dense (null).")


def tail_sums(energies: Tensor) -> Tensor:
    """Return (Σ_{i>=0} e, Σ_{i>=1} e, …, 0): what is left after keeping 0, 1, …, k directions."""
    tails = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def isotonic_upper_bound(errors: Tensor) -> Tensor:
    """Return the smallest non-increasing curve that bounds ``errors``; ``errors`` itself where the metric is shared."""
    return errors.clamp(min=0).flip(0).cummax(0).values.flip(0)


def check_finite(layer_data: LayerData) -> None:
    """Raise unless the weight and the bias are finite.

    Raises:
        NumericalError: they are not; names the layer.
    """
    for part in (layer_data.weight, layer_data.bias):
        if part is not None and not torch.isfinite(part).all():
            raise NumericalError(f"{layer_data.shape.name}: its weight or bias holds NaN or Inf. Load another checkpoint.")


def left(root: Root | None, matrix: Tensor, *, inverse: bool = False) -> Tensor:
    """Return L · matrix (or L⁻¹ · matrix); no root is the identity."""
    if root is None:
        return matrix
    factor = root.inverse if inverse else root.damped
    return factor[:, None] * matrix if factor.ndim == 1 else factor @ matrix


def _right(matrix: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return matrix
    return matrix * factor if factor.ndim == 1 else matrix @ factor


def row_root(metric: Metric, damping: Damping, name: str) -> Root | None:
    return None if metric.rows is None else invertible(damped_root(metric.rows, damping.rows, name, metric.row_power), name)


def _column_root(metrics: Sequence[Metric], damping: Damping, name: str) -> Root | None:
    columns = [metric.columns for metric in metrics if metric.columns is not None]
    if not columns:
        return None
    return damped_root(torch.stack(columns).mean(0), damping.columns, name)


def _target(layer_data: LayerData, basis: ErrorMetric, metric: Metric, columns: Root | None) -> Tensor:
    """Return T_i; the damping draws towards W, so that without drift it is W itself."""
    moment = basis.target_moment(layer_data)
    if moment is None:
        return layer_data.weight
    if metric.columns is None or metric.columns.ndim == 1 or columns is None:
        raise ConfigError(
            f"{basis.label}: drift is corrected in the moments of the inputs. Wrap whitened, pooled_feature or two_sided instead."
        )
    inverse = invertible(columns, layer_data.shape.name).inverse
    return layer_data.weight + layer_data.weight @ (moment - metric.columns) @ inverse @ inverse


def _errors(parts: Sequence[Tensor], down: Tensor, metrics: Sequence[Metric], columns: Root | None) -> Tensor:
    """Return e_0 … e_k (k + 1,) of U_i (m_i, k) and A (k, n)."""
    own = [metric.columns for metric in metrics if metric.columns is not None]
    if columns is None or all(torch.equal(own[0], other) for other in own[1:]):
        return tail_sums(_right(down, None if columns is None else columns.plain).square().sum(1)) * metrics[0].scale
    products = sum((_right(down, c) @ down.T) * (part.T @ part) for part, c in zip(parts, own, strict=True))
    assert isinstance(products, Tensor)
    corners = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # Σ_{j,k>r}
    return isotonic_upper_bound(torch.cat([corners, corners.new_zeros(1)])) * metrics[0].scale


def factorize_unit(unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, damping: Damping) -> FactorBasis:
    """Decompose the members of ``unit`` together; all float64.

    Raises:
        ConfigError: the basis corrects drift in a metric that is no moment of the inputs.
        NumericalError: NaN, Inf, or no convergence; names the layer.
    """
    weighing = _Weighing.of(unit, operands, basis, damping)
    weighed = weighing.left(weighing.target)
    directions, _, _ = svd(weighing.right(weighed), unit.name)
    down = directions.T @ weighed
    parts = torch.split(directions, weighing.sizes)
    up = weighing.left(directions, inverse=True)
    return _as_basis(unit, operands, basis, weighing, up, down, _errors(parts, down, weighing.metrics, weighing.columns))


def refit_unit(unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, damping: Damping, start: Factors) -> FactorBasis:
    """Return ``start`` after the least-squares turns of the metric: factors of one rank, whose slices are not optimal.

    Raises:
        as ``factorize_unit``.
    """
    weighing = _Weighing.of(unit, operands, basis, damping)
    up, down = refitted(weighing.target, torch.cat(start.ups), start.down, weighing.left, weighing.right, basis.refit_steps)
    return _as_basis(unit, operands, basis, weighing, up, down, weighing.errors_of(up, down))


@dataclass(frozen=True)
class _Weighing:
    """Targets of a unit's members, and their metric.

    Attributes:
        sizes: rows of each member.
        metrics, rows: of each member; columns: of all.
        target: [T_1; T_2; …] (M, n).
    """

    sizes: list[int]
    metrics: Sequence[Metric]
    rows: Sequence[Root | None]
    columns: Root | None
    target: Tensor

    @classmethod
    def of(cls, unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, damping: Damping) -> _Weighing:
        for layer_data in operands:
            check_finite(layer_data)
        metrics = [basis.metric(layer_data) for layer_data in operands]
        rows = [row_root(metric, damping, layer_data.shape.name) for metric, layer_data in zip(metrics, operands, strict=True)]
        columns = _column_root(metrics, damping, unit.name)
        targets = [_target(layer_data, basis, metric, columns) for layer_data, metric in zip(operands, metrics, strict=True)]
        return cls([layer_data.shape.d_out for layer_data in operands], metrics, rows, columns, torch.cat(targets))

    def left(self, matrix: Tensor, *, inverse: bool = False) -> Tensor:
        """Return [L_1 ·; L_2 ·; …] of an (M, k) matrix."""
        parts = torch.split(matrix, self.sizes)
        return torch.cat([left(root, part, inverse=inverse) for root, part in zip(self.rows, parts, strict=True)])

    def right(self, matrix: Tensor) -> Tensor:
        return _right(matrix, None if self.columns is None else self.columns.damped)

    def errors_of(self, up: Tensor, down: Tensor) -> Tensor:
        """Return the weighed errors (r + 1,) of the first 0, 1, …, r columns of ``up`` and rows of ``down``; damping is left out."""
        plain = None if self.columns is None else self.columns.plain
        target, own, inputs = _right(self.left(self.target), plain), self.left(up), _right(down, plain)
        matched = ((own.T @ target) * inputs).sum(1)
        products = (own.T @ own) * (inputs @ inputs.T)
        kept = 2 * matched.cumsum(0) - products.cumsum(0).cumsum(1).diagonal()
        total = target.square().sum()
        return torch.cat([total.reshape(1), (total - kept).clamp(min=0)]) * self.metrics[0].scale


def _as_basis(
    unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, weighing: _Weighing, up: Tensor, down: Tensor, errors: Tensor
) -> FactorBasis:
    balance = _balance(up, down)
    columns = weighing.columns
    return FactorBasis(
        unit=unit,
        ups=torch.split(up * balance, weighing.sizes),
        down=down / balance[:, None],
        biases=tuple(layer_data.bias for layer_data in operands),
        means=tuple(_means(layer_data) for layer_data in operands) if basis.centred else (),
        errors=errors,
        damping=0.0 if columns is None else columns.added,
        condition=1.0 if columns is None else columns.condition,
    )


def _means(layer_data: LayerData) -> tuple[Tensor, Tensor]:
    dense = layer_data.inputs.mean if layer_data.dense_mean is None else layer_data.dense_mean
    return layer_data.weight @ dense, layer_data.inputs.mean


def _balance(up: Tensor, down: Tensor) -> Tensor:
    """Return what makes column j of ``up`` and row j of ``down`` equally long: kind to narrow dtypes and to optimisers."""
    ratio = (down.norm(dim=1) / up.norm(dim=0)).sqrt()
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))

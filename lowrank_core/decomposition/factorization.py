"""From a metric to nested factors: one decomposition serves every rank.

Notation (metrics.base has the rest)::

    P_i      (P_i + δI)^γ of member i, damped;  P their block diagonal
    C        mean of the members' C_i (the directions are those of their sum)
    L, R     L Lᵀ = P and R Rᵀ = C + δI: triangular where that is sound, else symmetric roots
    T        stacked T_i (M, n): W_i, or for a basis that corrects drift W_i + W_i (K_i - C_i)(C + δI)⁻¹ = W_i (K_i + δI)(C + δI)⁻¹
    U Σ Vᵀ   of Lᵀ T R; only the smaller of its two Gram matrices is decomposed, and only the factor of that side is taken
    B, A     M < n:  B = L⁻ᵀ U,  A = Uᵀ Lᵀ T, U the eigenvectors of Lᵀ T (C + δI) Tᵀ L
             else:   B = T R V,  A = Vᵀ R⁻¹, V the eigenvectors of Rᵀ Tᵀ P T R;      T_r = B[:, :r] A[:r]
    e_r      Σ_i tr(P_i (T_i - T_{i,r}) C_i (T_i - T_{i,r})ᵀ), each member in its own metric and without the damping of C;  e_k = 0
             (with one C: Σ_{j>r} (Bᵀ P B)_jj (A C Aᵀ)_jj, since Bᵀ P B is diagonal)

A Gram matrix squares the singular values: those below 1e-8 of the largest are rounding, as are the errors that they leave (1e-16 of all).
Full rank is lossless whatever C is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_core.decomposition.refitting import refitted
from lowrank_core.errors import ConfigError, NumericalError, RankError
from lowrank_core.layers.forms import Factors
from lowrank_core.linalg import Damped, principal_directions, times
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
        ups: B_i (m_i, k) of each member, float64, or float32 where they were stored (``slice`` gives float64).
        down: A (k, n), likewise.
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
        ups, down = tuple(up[:, :rank].to(torch.float64) for up in self.ups), self.down[:rank].to(torch.float64)
        return Factors(ups, down, tuple(self._bias_at(index, up, down) for index, up in enumerate(ups)))

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


def row_metric(metric: Metric, damping: Damping, name: str) -> Damped | None:
    """Return (P + δI)^γ, or None for the identity.

    Raises:
        NumericalError: it is singular and not damped; names the layer.
    """
    return None if metric.rows is None else Damped.of(metric.rows, damping.rows, name, metric.row_power).invertible()


def column_metric(metrics: Sequence[Metric], damping: Damping, name: str) -> Damped | None:
    """Return the mean of the C_i of a unit's members with δI, or None for the identity."""
    columns = [metric.columns for metric in metrics if metric.columns is not None]
    if not columns:
        return None
    return Damped.of(columns[0] if len(columns) == 1 else torch.stack(columns).mean(0), damping.columns, name)


def _target(layer_data: LayerData, basis: ErrorMetric, metric: Metric, columns: Damped | None) -> Tensor:
    """Return T_i; the damping draws towards W, so that without drift it is W itself."""
    moment = basis.target_moment(layer_data)
    if moment is None:
        return layer_data.weight
    if metric.columns is None or metric.columns.ndim == 1 or columns is None:
        raise ConfigError(
            f"{basis.label}: drift is corrected in the moments of the inputs. Wrap whitened, pooled_feature or two_sided instead."
        )
    drifted = layer_data.weight @ (moment - metric.columns)
    if not torch.isfinite(drifted).all():
        raise NumericalError(f"{layer_data.shape.name}: NaN or Inf before a decomposition. Calibrate again.")
    correction: Tensor = torch.linalg.solve(columns.invertible().matrix, drifted, left=False)
    return layer_data.weight + correction


def factorize_unit(
    unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, damping: Damping, columns: Damped | None = None
) -> FactorBasis:
    """Decompose the members of ``unit`` together; all float64.

    Args:
        columns: the damped column metric of these operands, where another unit of the same inputs had it before.

    Raises:
        ConfigError: the basis corrects drift in a metric that is no moment of the inputs.
        NumericalError: NaN, Inf, or no convergence; names the layer.
    """
    weighing = _Weighing.of(unit, operands, basis, damping, columns)
    up, down = weighing.from_rows() if weighing.target.shape[0] < weighing.target.shape[1] else weighing.from_columns()
    return _as_basis(unit, operands, basis, weighing, up, down, weighing.errors(up, down))


def refit_unit(
    unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, damping: Damping, start: Factors, columns: Damped | None = None
) -> FactorBasis:
    """Return ``start`` after the least-squares turns of the metric: factors of one rank, whose slices are not optimal.

    Args and errors are those of ``factorize_unit``.
    """
    weighing = _Weighing.of(unit, operands, basis, damping, columns)
    up, down = refitted(weighing.target, torch.cat(start.ups), start.down, weighing.left, weighing.right, basis.refit_steps)
    return _as_basis(unit, operands, basis, weighing, up, down, weighing.errors_of_one_rank(up, down))


@dataclass(frozen=True)
class _Weighing:
    """Targets of a unit's members, and their metric.

    Attributes:
        unit: name, for messages.
        sizes: rows of each member.
        metrics, rows: of each member; columns: of all.
        target: T (M, n).
    """

    unit: str
    sizes: list[int]
    metrics: Sequence[Metric]
    rows: Sequence[Damped | None]
    columns: Damped | None
    target: Tensor

    @classmethod
    def of(cls, unit: Unit, operands: Sequence[LayerData], basis: ErrorMetric, damping: Damping, columns: Damped | None) -> _Weighing:
        for layer_data in operands:
            check_finite(layer_data)
        metrics = [basis.metric(layer_data) for layer_data in operands]
        rows = [row_metric(metric, damping, layer_data.shape.name) for metric, layer_data in zip(metrics, operands, strict=True)]
        columns = columns or column_metric(metrics, damping, unit.name)
        targets = [_target(layer_data, basis, metric, columns) for layer_data, metric in zip(operands, metrics, strict=True)]
        return cls(unit.name, [layer_data.shape.d_out for layer_data in operands], metrics, rows, columns, torch.cat(targets))

    def from_rows(self) -> tuple[Tensor, Tensor]:
        """Return B (M, M) and A (M, n) by the Gram matrix of the rows."""
        weighed = self.left(self.target)
        inputs = weighed if self.columns is None else times(self.columns.matrix, weighed.T).T
        _, directions = principal_directions(inputs @ weighed.T, self.unit)
        return self._by_rows(directions, Damped.inverse_transposed_times), directions.T @ weighed

    def from_columns(self) -> tuple[Tensor, Tensor]:
        """Return B (M, n) and A (n, n) by the Gram matrix of the columns."""
        spread = self.right(self.target)
        _, directions = principal_directions(spread.T @ self._weighed(spread), self.unit)
        return spread @ directions, directions.T if self.columns is None else self.columns.inverse_transposed_times(directions).T

    def left(self, matrix: Tensor) -> Tensor:
        """Return Lᵀ · of an (M, k) matrix."""
        return self._by_rows(matrix, Damped.transposed_times)

    def right(self, matrix: Tensor) -> Tensor:
        """Return · R of a (k, n) matrix."""
        return matrix if self.columns is None else self.columns.transposed_times(matrix.T).T

    def _weighed(self, matrix: Tensor) -> Tensor:
        """Return P · of an (M, k) matrix."""
        return self._by_rows(matrix, lambda metric, part: times(metric.matrix, part))

    def _by_rows(self, matrix: Tensor, product: Callable[[Damped, Tensor], Tensor]) -> Tensor:
        """Return what each member's row metric makes of its rows of an (M, k) matrix."""
        parts = torch.split(matrix, self.sizes)
        return torch.cat([part if metric is None else product(metric, part) for metric, part in zip(self.rows, parts, strict=True)])

    def errors(self, up: Tensor, down: Tensor) -> Tensor:
        """Return e_0 … e_k (k + 1,) of nested factors."""
        weighed = self._weighed(up)
        own = [metric.columns for metric in self.metrics if metric.columns is not None]
        if all(torch.equal(own[0], other) for other in own[1:]):
            inputs = down if not own else times(own[0], down.T).T
            return tail_sums((up * weighed).sum(0) * (inputs * down).sum(1).clamp(min=0)) * self.metrics[0].scale
        parts = zip(torch.split(up, self.sizes), torch.split(weighed, self.sizes), own, strict=True)
        products = sum((times(columns, down.T).T @ down.T) * (part.T @ heavy) for part, heavy, columns in parts)
        assert isinstance(products, Tensor)
        corners = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # Σ_{j,k>r}
        return isotonic_upper_bound(torch.cat([corners, corners.new_zeros(1)])) * self.metrics[0].scale

    def errors_of_one_rank(self, up: Tensor, down: Tensor) -> Tensor:
        """Return the weighed errors (r + 1,) of the first 0, 1, …, r columns of ``up`` and rows of ``down``."""
        weighed = self._weighed(up)
        target, inputs = (part if self.columns is None else times(self.columns.plain, part.T).T for part in (self.target, down))
        matched = (weighed * (target @ down.T)).sum(0)
        products = (up.T @ weighed) * (inputs @ down.T)
        kept = 2 * matched.cumsum(0) - products.cumsum(0).cumsum(1).diagonal()
        total = (self._weighed(self.target) * target).sum()
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

"""One decomposition serves every rank: lossless at full rank, errors as measured, finite whatever the inputs are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from operands import applied, factorized, gradients, inputs_of, layer_data, outputs_of, random, rows, second_moment
from torch import Tensor

from lowrank_core.decomposition.factorization import Damping, FactorBasis, isotonic_upper_bound, tail_sums
from lowrank_core.errors import NumericalError, RankError
from lowrank_core.linalg import Damped, eigenvalues, square_root, svd
from lowrank_core.metrics import METRICS, LayerData, metric_named

EPSILON = torch.finfo(torch.float64).eps
TOLERANCE = 1e7 * EPSILON  # decompositions of matrices of a few dozen rows, metrics of a condition up to 1e6
SHAPES = [(24, 16), (16, 24), (20, 20), (1, 12), (12, 1), (1, 1)]
NAMES = [*METRICS, "shared_input:two_sided", "shared_input:pooled_feature", "cross_layer:two_sided", "drift_aware:pooled_feature"]
WITH_DATA = [
    name for name in NAMES if metric_named(name).needs_data and metric_named(name).metric(layer_data(4, rows(6))).columns.ndim == 2
]  # type: ignore[union-attr]
CENTRED = [name for name in NAMES if metric_named(name).centred]


def stack(x: Tensor, *, biases: tuple[bool, ...] = (False, True, False)) -> list[LayerData]:
    """Return matrices of different heights that read the same input."""
    return [layer_data(8 + 5 * i, x, name=f"m{i}", bias=bias, seed=20 + i) for i, bias in enumerate(biases)]


def outputs(given: LayerData, x: Tensor) -> Tensor:
    y = x @ given.weight.T
    return y if given.bias is None else y + given.bias


# --- laws of every basis ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_is_lossless(name: str, d_out: int, d_in: int, bias: bool):
    x = rows(d_in)
    given = layer_data(d_out, x, bias=bias)
    result = factorized(name, given)
    assert result.max_rank == min(d_out, d_in)
    factors = result.slice(result.max_rank)
    torch.testing.assert_close(factors.ups[0] @ factors.down, given.weight, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(applied(factors, x), outputs(given, x), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_errors_fall_to_zero(name: str, d_out: int, d_in: int):
    result = factorized(name, layer_data(d_out, rows(d_in)))
    assert result.errors.dtype == torch.float64
    assert len(result.errors) == result.max_rank + 1
    assert (result.errors.diff() <= 0).all()
    assert result.errors[-1] == 0
    assert result.errors[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_nested(name: str):
    result = factorized(name, *stack(rows(16)))
    small, large = result.slice(3), result.slice(9)
    assert torch.equal(large.down[:3], small.down)
    assert all(torch.equal(wide[:, :3], narrow) for wide, narrow in zip(large.ups, small.ups, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_both_factors_of_a_direction_are_equally_long(name: str):
    """Kind to narrow dtypes; without it a factor is orthonormal and the other holds all the scale."""
    result = factorized(name, replace(layer_data(24, rows(16)), weight=1e6 * random(24, 16)))
    torch.testing.assert_close(torch.cat(result.ups).norm(dim=0), result.down.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, -1, 17])
def test_ranks_outside_the_limits_are_refused(name: str, rank: int):
    with pytest.raises(RankError, match=r"layer: rank must be in \[1, 16\].*or leave the layer dense"):
        factorized(name, layer_data(24, rows(16))).slice(rank)


@pytest.mark.parametrize("damping", [1e-12, 1e-6, 1e-2])
@pytest.mark.parametrize("name", ["whitened", "pooled_feature", "shared_input", "cross_layer", "drift_aware"])
def test_the_reported_error_is_the_measured_one_in_sample_at_every_damping(name: str, damping: float):
    x = rows(16)
    given = layer_data(24, x, bias=True)
    result = factorized(name, given, damping=Damping(columns=damping))
    count = len(x) - metric_named(name).centred  # a covariance is normalised by N - 1
    for rank in range(1, result.max_rank + 1):
        measured = (outputs(given, x) - applied(result.slice(rank), x)).square().sum() / count
        torch.testing.assert_close(result.errors[rank], measured, rtol=1e-8, atol=1e-8 * float(result.errors[0]))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_two_sided_error_is_measured_in_the_damped_gradients(gamma: float):
    x, g = rows(16), gradients(24)
    given = layer_data(24, x, g=g)
    result = factorized("two_sided", given, damping=Damping(rows=0.05), gamma=gamma)
    moment = second_moment(g)
    values, vectors = torch.linalg.eigh(moment + 0.05 * moment.trace() / 24 * torch.eye(24, dtype=torch.float64))
    metric = (vectors * values**gamma) @ vectors.T
    for rank in range(1, 17):
        gone = outputs(given, x) - applied(result.slice(rank), x)
        measured = (gone @ metric * gone).sum() / (len(x) - 1) / 2
        torch.testing.assert_close(result.errors[rank], measured, rtol=1e-8, atol=1e-8 * float(result.errors[0]))


# --- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whitened", "two_sided", "pooled_feature", "weight_svd", "fisher_rows", "activation_scaled"])
@pytest.mark.parametrize("wrapper", ["shared_input", "cross_layer"])
def test_a_stack_of_one_is_the_plain_basis(wrapper: str, name: str):
    given = layer_data(24, rows(16), bias=True)
    ours, plain = factorized(f"{wrapper}:{name}", given), factorized(name, given)
    assert torch.equal(ours.errors, plain.errors)
    assert torch.equal(ours.down, plain.down)
    assert torch.equal(ours.ups[0], plain.ups[0])


@pytest.mark.parametrize(
    "name", ["shared_input", "shared_input:pooled_feature", "shared_input:two_sided", "cross_layer", "cross_layer:two_sided"]
)
@pytest.mark.parametrize("shared", [True, False])
def test_the_error_of_a_stack_is_the_sum_of_its_members_measured_errors(name: str, shared: bool):
    """Whether they read one input, as in shared_input, or each its own, as in cross_layer."""
    xs = [rows(16)] * 3 if shared else [rows(16, seed=seed) * scale for seed, scale in ((0, 1.0), (5, 3.0), (9, 0.5))]
    members = [layer_data(8 + 5 * i, x, name=f"m{i}", bias=i == 1, seed=20 + i) for i, x in enumerate(xs)]
    result = factorized(name, *members, damping=Damping(columns=1e-9))
    count = len(xs[0]) - metric_named(name).centred
    measured = []
    for rank in range(1, result.max_rank + 1):
        factors, total = result.slice(rank), 0.0
        for index, (given, x) in enumerate(zip(members, xs, strict=True)):
            gone = outputs(given, x) - applied(factors, x, index)
            metric = _row_metric(name, given)
            total += float((gone @ metric * gone).sum()) / count * (0.5 if "two_sided" in name else 1.0)
        measured.append(total)
    curve = torch.tensor(measured, dtype=torch.float64)
    torch.testing.assert_close(result.errors[1:], isotonic_upper_bound(curve), rtol=1e-7, atol=1e-9 * float(result.errors[0]))
    if shared:  # then the curve is the spectrum's tail, and falls by itself
        torch.testing.assert_close(result.errors[1:], curve, rtol=1e-7, atol=1e-9 * float(result.errors[0]))


def _row_metric(name: str, given: LayerData) -> Tensor:
    eye = torch.eye(len(given.weight), dtype=torch.float64)
    if "two_sided" not in name:
        return eye
    assert given.outputs is not None
    gradient = given.outputs.gradient
    return gradient + 1e-2 * gradient.trace() / len(gradient) * eye


def test_an_error_that_rises_with_the_rank_is_never_understated():
    curve = torch.tensor([5.0, 3.0, 3.5, 1.0, 1.2, -1e-20], dtype=torch.float64)
    assert isotonic_upper_bound(curve).tolist() == [5.0, 3.5, 3.5, 1.2, 1.2, 0.0]


@pytest.mark.parametrize("name", ["shared_input", "shared_input:two_sided", "data_free_joint"])
def test_a_stack_is_the_basis_of_the_stacked_rows(name: str):
    members = stack(rows(16))
    result = factorized(name, *members)
    inner = metric_named(name).inner  # type: ignore[attr-defined]
    weight = torch.cat([given.weight for given in members])
    if inner.needs_gradients:
        roots = [_root(_row_metric("two_sided", given)) for given in members]
        weight = torch.cat([root @ given.weight for root, given in zip(roots, members, strict=True)])
    metric = members[0].inputs.second_moment if not inner.centred else members[0].inputs.sample
    metric = metric + 1e-6 * metric.trace() / 16 * torch.eye(16, dtype=torch.float64)
    root = _root(metric) if inner.needs_data else torch.eye(16, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    for rank in (1, 5, 12):
        factors = result.slice(rank)
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
        if inner.needs_gradients:
            parts = expected.split([len(given.weight) for given in members])
            expected = torch.cat([torch.linalg.solve(r, part) for r, part in zip(roots, parts, strict=True)])
        torch.testing.assert_close(torch.cat(factors.ups) @ factors.down, expected, rtol=1e-7, atol=1e-7)


def _root(metric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.sqrt()) @ vectors.T


def test_data_free_joint_is_the_svd_of_the_stacked_weights():
    members = stack(rows(16))
    result = factorized("data_free_joint", *members)
    values = torch.linalg.svdvals(torch.cat([given.weight for given in members]))
    torch.testing.assert_close(result.errors, tail_sums(values.square()), rtol=TOLERANCE, atol=1e-10)


def test_cross_layer_uses_the_sum_of_the_members_metrics():
    xs = [rows(16), 3 * rows(16, seed=5)]
    members = [layer_data(12, x, name=f"m{i}", seed=20 + i) for i, x in enumerate(xs)]
    factors = factorized("cross_layer", *members).slice(5)
    both = [replace(given, inputs=inputs_of(torch.cat(xs))) for given in members]
    expected = factorized("shared_input", *both).slice(5)  # the second moment of all tokens is the mean of the two
    torch.testing.assert_close(torch.cat(factors.ups) @ factors.down, torch.cat(expected.ups) @ expected.down, rtol=1e-7, atol=1e-7)


def test_a_stack_of_drifted_matrices_targets_each_of_them():
    x = rows(16)
    y = x + 0.2 * random(len(x), 16, seed=3)
    members = [replace(given, inputs=inputs_of(y), cross=x.T @ y / len(x)) for given in stack(x, biases=(False, False, False))]
    result = factorized("shared_input:drift_aware", *members, damping=Damping(columns=1e-12))
    factors = result.slice(result.max_rank)
    for index, given in enumerate(members):
        expected = torch.linalg.lstsq(y, x @ given.weight.T).solution.T
        torch.testing.assert_close(factors.ups[index] @ factors.down, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["data_free_joint", "shared_input:two_sided", "cross_layer:pooled_feature"])
def test_full_rank_of_a_stack_is_lossless(name: str):
    x = rows(16)
    members = stack(x)
    factors = factorized(name, *members).slice(16)
    for index, given in enumerate(members):
        torch.testing.assert_close(applied(factors, x, index), outputs(given, x), rtol=TOLERANCE, atol=TOLERANCE)


# --- centring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("rank", [1, 4, 9, 16])
def test_a_centred_basis_keeps_the_mean_output_at_every_rank(name: str, rank: int):
    xs = [rows(16, seed=seed, mean=mean) for seed, mean in ((0, 2.0), (5, -1.0))]
    members = [layer_data(18, x, name=f"m{i}", bias=i == 0, seed=20 + i) for i, x in enumerate(xs)]
    result = factorized(name, *members)
    for index, (given, x) in enumerate(zip(members, xs, strict=True)):
        factors = result.slice(rank)
        torch.testing.assert_close(applied(factors, x, index).mean(0), outputs(given, x).mean(0), rtol=1e-9, atol=1e-9)
        plain = factorized("whitened", given).slice(rank)
        if rank < 16:
            assert (applied(plain, x).mean(0) - outputs(given, x).mean(0)).abs().max() > 1e-6  # without a bias it is not


@pytest.mark.parametrize("name", NAMES)
def test_the_bias_of_a_centred_basis_is_counted(name: str):
    result = factorized(name, layer_data(24, rows(16)), layer_data(10, rows(16), name="other", bias=True))
    factors = result.slice(3)
    stored = sum(up.numel() for up in factors.ups) + factors.down.numel() + sum(bias.numel() for bias in factors.biases if bias is not None)
    assert stored == result.unit.parameters(3) == 3 * (24 + 10 + 16) + 10 + 24 * metric_named(name).centred


# --- ill-conditioned -------------------------------------------------------------------------------------------------


def _few_tokens() -> Tensor:
    return rows(16, tokens=5)


def _duplicated() -> Tensor:
    x = rows(8)
    return torch.cat([x, x], dim=1)


def _dead() -> Tensor:
    x = rows(16)
    x[:, [2, 9]] = 0
    return x


def _constant() -> Tensor:
    return torch.ones(50, 16, dtype=torch.float64)


def _zeros() -> Tensor:
    return torch.zeros(50, 16, dtype=torch.float64)


def _outlier() -> Tensor:
    x = rows(16)
    x[:, 3] *= 1e6
    return x


def _narrow() -> Tensor:
    return rows(16) * 1e-12


ILL: dict[str, Callable[[], Tensor]] = {
    "fewer tokens than dimensions": _few_tokens,
    "duplicated features": _duplicated,
    "dead neurons": _dead,
    "a constant input": _constant,
    "an input of zeros": _zeros,
    "a huge outlier channel": _outlier,
    "a tiny input": _narrow,
}
SINGULAR = ("fewer tokens than dimensions", "duplicated features", "dead neurons", "a constant input", "an input of zeros")


def finite(result: FactorBasis) -> bool:
    return all(torch.isfinite(part).all() for part in (*result.ups, result.down, result.errors)) and math.isfinite(result.damping)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ill", ILL)
@pytest.mark.parametrize("d_out", [24, 10])
def test_ill_conditioned_inputs_stay_finite_and_full_rank_stays_lossless(name: str, ill: str, d_out: int):
    x = ILL[ill]()
    given = layer_data(d_out, x, bias=True)
    result = factorized(name, given)
    assert finite(result)
    assert (result.errors.diff() <= 0).all()
    factors = result.slice(result.max_rank)
    torch.testing.assert_close(factors.ups[0] @ factors.down, given.weight, rtol=1e-8, atol=1e-8)
    assert factors.biases[0] is not None
    scale = max(1.0, float(x.abs().max()))
    torch.testing.assert_close(applied(factors, x), outputs(given, x), rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("ill", ILL)
def test_damping_and_condition_are_recorded(name: str, ill: str):
    x = ILL[ill]()
    result = factorized(name, layer_data(10, x), damping=Damping(columns=1e-3))
    metric = metric_named(name).metric(layer_data(10, x)).columns
    assert metric is not None
    mean = float(metric.trace()) / 16
    assert result.damping == pytest.approx(1e-3 * mean if mean > 0 else 1.0)
    if ill in SINGULAR:
        assert result.condition == math.inf
    else:
        assert result.condition == pytest.approx(float(torch.linalg.cond(metric)), rel=1e-3)


@pytest.mark.parametrize("name", ["weight_svd", "fisher_rows", "data_free_joint"])
def test_a_basis_without_data_damps_no_inputs(name: str):
    result = factorized(name, layer_data(10, rows(16)))
    assert (result.damping, result.condition) == (0.0, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_zero_weights_stay_zero(name: str):
    given = replace(layer_data(24, rows(16), bias=True), weight=torch.zeros(24, 16, dtype=torch.float64))
    result = factorized(name, given)
    factors = result.slice(3)
    assert finite(result)
    assert not (factors.ups[0] @ factors.down).any()
    assert not result.errors.any()
    assert given.bias is not None
    assert factors.biases[0] is not None
    assert torch.equal(factors.biases[0], given.bias)


@pytest.mark.parametrize("name", [name for name in NAMES if metric_named(name).needs_gradients])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_outputs_that_no_gradient_reaches_are_weighed_equally(name: str, damping: float):
    x = rows(16)
    given = layer_data(24, x, g=torch.zeros(400, 24, dtype=torch.float64))
    result = factorized(name, given, damping=Damping(rows=damping))
    assert finite(result)
    factors = result.slice(16)
    torch.testing.assert_close(factors.ups[0] @ factors.down, given.weight, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in NAMES if metric_named(name).needs_gradients])
def test_a_singular_row_metric_without_damping_names_the_layer_and_the_way_out(name: str):
    g = gradients(24)
    g[:, 3] = 0
    given = layer_data(24, rows(16), g=g)
    with pytest.raises(NumericalError, match=r"layer: its metric is singular, and the damping is 0\. Set the damping"):
        factorized(name, given, damping=Damping(rows=0.0))
    assert finite(factorized(name, given, damping=Damping(rows=1e-6)))


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("ill", SINGULAR)
@pytest.mark.parametrize("d_out", [24, 10])
def test_without_damping_a_singular_input_loses_nothing_that_it_shows(name: str, ill: str, d_out: int):
    x = ILL[ill]()
    given = layer_data(d_out, x, bias=True)
    result = factorized(name, given, damping=Damping(columns=0.0))
    assert finite(result)
    torch.testing.assert_close(applied(result.slice(result.max_rank), x), outputs(given, x), rtol=1e-6, atol=1e-6)


def test_drift_corrected_in_a_singular_metric_without_damping_is_refused():
    x = _duplicated()
    given = replace(layer_data(10, x), cross=x.T @ x / len(x))
    with pytest.raises(NumericalError, match="layer: its metric is singular"):
        factorized("drift_aware", given, damping=Damping(columns=0.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_not_finite_name_the_layer(name: str, poison: float, part: str):
    given = layer_data(8, rows(16), name="mlp.up", bias=True)
    tensor = getattr(given, part)
    tensor.view(-1)[3] = poison
    with pytest.raises(NumericalError, match=r"mlp\.up: its weight or bias holds NaN or Inf"):
        factorized(name, given)


@pytest.mark.parametrize("name", [name for name in NAMES if metric_named(name).needs_data])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_inputs_that_are_not_finite_name_the_layer(name: str, poison: float):
    given = layer_data(8, rows(16), name="mlp.up")
    for part in (given.inputs.sample, given.inputs.pooled, given.inputs.absolute_mean):
        part.view(-1)[5] = poison
    with pytest.raises(NumericalError, match=r"mlp\.up: NaN or Inf before a decomposition"):
        factorized(name, given)


@pytest.mark.parametrize("name", [name for name in NAMES if metric_named(name).needs_gradients])
def test_gradients_that_are_not_finite_name_the_layer(name: str):
    first, second = stack(rows(16), biases=(False, False))
    assert second.outputs is not None
    second.outputs.gradient[2, 2] = math.nan
    second.outputs.fisher_rows[2] = math.nan
    with pytest.raises(NumericalError, match="m1: NaN or Inf before a decomposition"):
        factorized(name, first, second)


def test_drift_that_is_not_finite_names_the_layer():
    given = replace(layer_data(8, rows(16), name="mlp.up"), cross=torch.full((16, 16), math.nan, dtype=torch.float64))
    with pytest.raises(NumericalError, match=r"mlp\.up: NaN or Inf"):
        factorized("drift_aware", given)


# --- roots and tails -------------------------------------------------------------------------------------------------


def test_tails_are_what_is_left_after_each_direction():
    assert tail_sums(torch.tensor([4.0, 2.0, 1.0])).tolist() == [7.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_roots_are_those_of_the_damped_metric(power: float, damping: float):
    metric = second_moment(rows(12))
    damped = Damped.of(metric, damping, "layer", power)
    eye = torch.eye(12, dtype=torch.float64)
    assert damped.added == pytest.approx(damping * float(metric.trace()) / 12)
    torch.testing.assert_close(damped.factor @ damped.factor.T, damped.matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(damped.transposed_times(eye), damped.factor.T)
    torch.testing.assert_close(damped.transposed_times(damped.inverse_transposed_times(eye)), eye, rtol=1e-8, atol=1e-8)
    whole = damped.matrix if power == 1 else damped.matrix @ damped.matrix
    torch.testing.assert_close(whole, metric + damped.added * eye, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_diagonal_metric_is_that_of_its_matrix(power: float):
    values = torch.linspace(0, 3, 7, dtype=torch.float64)
    one, whole = Damped.of(values, 0.1, "layer", power), Damped.of(torch.diag(values), 0.1, "layer", power)
    torch.testing.assert_close(torch.diag(one.matrix), whole.matrix, rtol=1e-9, atol=1e-9)
    matrix = random(7, 3)
    for product in (Damped.transposed_times, Damped.inverse_transposed_times):
        torch.testing.assert_close(product(one, matrix), product(whole, matrix), rtol=1e-9, atol=1e-9)
    assert one.added == pytest.approx(whole.added)
    assert one.condition == whole.condition == math.inf


def test_triangular_and_symmetric_factors_give_the_same_matrices(monkeypatch: pytest.MonkeyPatch):
    given = layer_data(24, rows(16))
    triangular = factorized("two_sided", given)
    monkeypatch.setattr(Damped, "_triangular", False)
    symmetric = factorized("two_sided", given)
    torch.testing.assert_close(triangular.errors, symmetric.errors, rtol=1e-9, atol=1e-12 * float(symmetric.errors[0]))
    one, other = triangular.slice(5), symmetric.slice(5)
    torch.testing.assert_close(one.ups[0] @ one.down, other.ups[0] @ other.down, rtol=1e-8, atol=1e-8)


def test_rounding_of_the_sums_below_minus_the_damping_counts_as_rounding():
    """Sums in float32 may leave an eigenvalue of -1e-5 of the mean."""
    metric = torch.diag(torch.tensor([1.0, -1e-5, 1e-3], dtype=torch.float64))
    damped = Damped.of(metric, 1e-6, "layer")
    assert damped._lower is None
    torch.testing.assert_close(damped.factor @ damped.factor.T, damped.matrix)
    assert float(torch.linalg.eigvalsh(damped.matrix)[0]) == pytest.approx(damped.added, rel=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97, 0.999, 1.5])
def test_no_eigenvalue_of_a_damped_metric_is_far_below_the_damping(share: float):
    """Rounding of sums leaves one of -share·δ in a direction that no coordinate stands for: no pivot of Cholesky's shows it."""
    vectors = torch.linalg.qr(random(160, 160)).Q
    values = torch.logspace(0, -3, 160, dtype=torch.float64)
    damping = 1e-5
    values[-1] = -share * damping * float(values.mean())
    damped = Damped.of((vectors * values) @ vectors.T, damping, "layer")
    assert float(torch.linalg.eigvalsh(damped.matrix)[0]) > 0.85 * damped.added
    eye = torch.eye(160, dtype=torch.float64)
    largest = float(torch.linalg.matrix_norm(damped.inverse_transposed_times(eye), ord=2)) ** 2
    assert largest < 1 / (0.85 * damped.added)


def rounded_moment(tokens: int, width: int) -> Tensor:
    """Return a second moment of fewer tokens than dimensions, nearly all in one direction, as products in float32 sum it."""
    x = random(tokens, width)
    x += 90 * x[:, :1]
    return (x.float().T @ x.float()).to(torch.float64) / tokens


def test_a_moment_that_is_singular_but_for_rounding_has_a_symmetric_factor():
    metric = rounded_moment(32, 96)
    damping = 0.5 * float(-torch.linalg.eigvalsh(metric)[0] / metric.diagonal().mean())  # less than rounding took
    damped = Damped.of(metric, damping, "layer")
    assert torch.linalg.cholesky_ex(metric + damped.added * torch.eye(96, dtype=torch.float64)).info > 0
    eye = torch.eye(96, dtype=torch.float64)
    size = float(metric.diagonal().mean())
    torch.testing.assert_close(damped.factor @ damped.factor.T, damped.matrix, rtol=0, atol=1e-9 * size)
    assert float(torch.linalg.eigvalsh(damped.matrix)[0]) > 0.9 * damped.added
    torch.testing.assert_close(damped.transposed_times(damped.inverse_transposed_times(eye)), eye, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pooled_feature", "two_sided", "whitened"])
def test_fewer_tokens_than_dimensions_are_decomposed(name: str):
    """Rounding of float32 products is larger than the default damping."""
    given = layer_data(128, random(32, 96))
    moment = rounded_moment(32, 96)
    basis = factorized(name, replace(given, inputs=replace(given.inputs, pooled=moment, sample=moment)))
    assert float(basis.errors[-1]) <= 1e-9 * float(basis.errors[0])


def test_the_condition_is_the_same_with_and_without_eigenvectors():
    metric = second_moment(rows(12))
    before, after = Damped.of(metric, 0.1, "layer"), Damped.of(metric, 0.1, "layer")
    assert after._eigen[1] is not None
    assert before.condition == pytest.approx(after.condition, rel=1e-6)
    assert before.condition == pytest.approx(float(torch.linalg.cond(metric)), rel=1e-6)


def test_rounding_below_zero_counts_as_rounding():
    metric = torch.diag(torch.tensor([1.0, -1e-18], dtype=torch.float64))
    damped = Damped.of(metric, 0.0, "layer")
    assert 0 < damped.factor[1, 1] < 1e-7
    assert damped.condition == math.inf
    assert eigenvalues(metric, "layer").tolist() == [1.0, 0.0]


def test_a_square_root_squares_back():
    x = rows(12)
    root = square_root(inputs_of(x).sample, "layer")
    torch.testing.assert_close(root @ root, torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_singular_values_descend_and_rebuild_the_matrix():
    matrix = random(7, 12)
    left, values, right = svd(matrix.to(torch.float32), "layer")
    assert values.dtype == torch.float64
    assert (values.diff() <= 0).all()
    torch.testing.assert_close((left * values) @ right, matrix.to(torch.float32).double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [lambda m: svd(m, "mlp.up"), lambda m: eigenvalues(m, "mlp.up"), lambda m: square_root(m, "mlp.up")])
def test_decompositions_of_nan_name_the_layer(function: Callable[[Tensor], object]):
    with pytest.raises(NumericalError, match=r"mlp\.up: NaN or Inf before a decomposition"):
        function(torch.full((3, 3), math.nan))


def test_a_decomposition_that_does_not_converge_names_the_layer(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    for name in ("svd", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fails)
    for decompose in (svd, eigenvalues, square_root):
        with pytest.raises(NumericalError, match=r"mlp\.up: .*did not converge.*Calibrate on more text"):
            decompose(torch.eye(3), "mlp.up")


def test_statistics_made_here_are_those_of_their_samples():
    """The helpers of these tests, against the textbook."""
    x, g = rows(6), gradients(5)
    result = outputs_of(g, x)
    torch.testing.assert_close(inputs_of(x).second_moment, second_moment(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        result.fisher_rows, torch.stack([torch.outer(a, b).square().sum(1) for a, b in zip(g, x, strict=True)]).mean(0)
    )

"""Each basis is the formula of its paper; what it says it needs is what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from operands import factorized, gradients, inputs_of, layer_data, outputs_of, random, rows, second_moment
from torch import Tensor

from lowrank_core.config import CompressionConfig
from lowrank_core.decomposition.factorization import Damping
from lowrank_core.errors import ConfigError
from lowrank_core.metrics import METRICS, WRAPPERS, LayerData, by_input, metric_named, metric_of
from lowrank_core.metrics.drift_aware import DriftAware
from lowrank_core.parameters import MatrixShape
from lowrank_core.statistics.pooling import PooledAccumulator

SHAPES = [(24, 16), (16, 24), (20, 20), (1, 12), (12, 1)]
EPSILON = torch.finfo(torch.float64).eps
TOLERANCE = 1e8 * EPSILON  # roots of metrics whose condition is about 1e6 after damping
WRAPPED = ("shared_input:two_sided", "cross_layer:pooled_feature", "drift_aware:two_sided", "shared_input:drift_aware:pooled_feature")

Sides = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None, float, float]]


def covariance(x: Tensor) -> Tensor:
    return torch.from_numpy(np.cov(x.numpy(), rowvar=False)).reshape(x.shape[1], x.shape[1])


FORMULAS: dict[str, Sides] = {
    "weight_svd": lambda x, g: (None, None, 1.0, 1.0),
    "data_free_joint": lambda x, g: (None, None, 1.0, 1.0),
    "fisher_rows": lambda x, g: (torch.diag((g.square() * x.square().sum(1, keepdim=True)).mean(0)), None, 1.0, 1.0),
    "activation_scaled": lambda x, g: (None, torch.diag(x.abs().mean(0)), 1.0, 1.0),  # √ of it scales W: α = ½
    "pooled_feature": lambda x, g: (None, covariance(x), 1.0, 1.0),
    "whitened": lambda x, g: (None, second_moment(x), 1.0, 1.0),
    "shared_input": lambda x, g: (None, second_moment(x), 1.0, 1.0),
    "cross_layer": lambda x, g: (None, second_moment(x), 1.0, 1.0),
    "drift_aware": lambda x, g: (None, second_moment(x), 1.0, 1.0),
    "refitted": lambda x, g: (None, second_moment(x), 1.0, 1.0),
    "two_sided": lambda x, g: (second_moment(g), covariance(x), 1.0, 0.5),
    "two_sided_half": lambda x, g: (second_moment(g), covariance(x), 0.5, 0.5),
    "two_sided_uncentred": lambda x, g: (second_moment(g), second_moment(x), 1.0, 0.5),
    "shared_input:two_sided": lambda x, g: (second_moment(g), covariance(x), 1.0, 0.5),
    "cross_layer:pooled_feature": lambda x, g: (None, covariance(x), 1.0, 1.0),
    "drift_aware:two_sided": lambda x, g: (second_moment(g), covariance(x), 1.0, 0.5),
    "shared_input:drift_aware:pooled_feature": lambda x, g: (None, covariance(x), 1.0, 1.0),
}
"""Name -> (P, C, γ, scale) of tr(P^γ ΔW C ΔWᵀ) · scale, from the samples themselves."""


def damped(metric: Tensor, damping: float) -> Tensor:
    return metric + damping * metric.trace() / len(metric) * torch.eye(len(metric), dtype=torch.float64)


def power(metric: Tensor, exponent: float) -> Tensor:
    return torch.from_numpy(np.real(scipy.linalg.fractional_matrix_power(metric.numpy(), exponent)).reshape(metric.shape))


def best(weight: Tensor, p: Tensor, c: Tensor, rank: int) -> Tensor:
    """Return the minimiser of tr(P ΔW C ΔWᵀ) by Cholesky factors and an eigendecomposition, which the code uses neither of."""
    left, right = torch.linalg.cholesky(p), torch.linalg.cholesky(c)
    weighed = left.T @ weight @ right
    top = torch.linalg.eigh(weighed.T @ weighed).eigenvectors[:, -rank:]
    return torch.linalg.solve(left.T, torch.linalg.solve(right.T, (weighed @ top @ top.T).T).T)


def sides(name: str, x: Tensor, g: Tensor, damping: Damping) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return P^γ damped, C damped, C, and the scale."""
    p, c, gamma, scale = FORMULAS[name](x, g)
    rows_metric = torch.eye(g.shape[1], dtype=torch.float64) if p is None else power(damped(p, damping.rows), gamma)
    plain = torch.eye(x.shape[1], dtype=torch.float64) if c is None else c
    return rows_metric, plain if c is None else damped(c, damping.columns), plain, scale


def test_every_basis_has_a_formula_here():
    assert set(FORMULAS) == {*METRICS, *WRAPPED}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_a_slice_is_the_best_matrix_of_its_rank_in_the_metric_of_the_paper(name: str, d_out: int, d_in: int):
    x, g = rows(d_in), gradients(d_out)
    damping = Damping(columns=1e-4, rows=1e-2)
    given = layer_data(d_out, x, g=g)
    result = factorized(name, given, damping=damping)
    p, c, plain, scale = sides(name, x, g, damping)
    for rank in range(1, min(d_out, d_in) + 1):
        factors = result.slice(rank)
        product = factors.ups[0] @ factors.down
        torch.testing.assert_close(product, best(given.weight, p, c, rank), rtol=1e-5, atol=1e-6 * float(given.weight.abs().max()))
        gone = given.weight - product
        torch.testing.assert_close(
            result.errors[rank], scale * (p @ gone @ plain @ gone.T).trace(), rtol=1e-8, atol=1e-8 * float(result.errors[0])
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_no_random_factors_of_equal_rank_do_better(name: str):
    """Optimality against challengers that start at the optimum and step anywhere; a plain SVD of the weight fails for most."""
    x, g = rows(16), gradients(24)
    damping = Damping(columns=1e-4, rows=1e-2)
    given = layer_data(24, x, g=g)
    factors = factorized(name, given, damping=damping).slice(5)
    p, c, _, _ = sides(name, x, g, damping)

    def error(up: Tensor, down: Tensor) -> float:
        gone = given.weight - up @ down
        return float((p @ gone @ c @ gone.T).trace())

    minimum = error(factors.ups[0], factors.down)
    for seed in range(20):
        for step in (1e-3, 1e-1):
            assert error(factors.ups[0] + step * random(24, 5, seed=seed), factors.down + step * random(5, 16, seed=seed + 99)) > minimum


def test_pooled_feature_is_the_papers_eigendecomposition_of_the_outputs():
    x = rows(16)
    given = layer_data(24, x)
    result = factorized("pooled_feature", given, damping=Damping(columns=1e-12))
    y = x @ given.weight.T
    values, vectors = torch.linalg.eigh(torch.cov(y.T))
    for rank in (1, 5, 11):
        top = vectors[:, -rank:]
        factors = result.slice(rank)
        torch.testing.assert_close(factors.ups[0] @ factors.down, top @ top.T @ given.weight, rtol=1e-7, atol=1e-7)
        assert factors.biases[0] is not None
        torch.testing.assert_close(factors.biases[0], y.mean(0) - top @ top.T @ y.mean(0), rtol=1e-7, atol=1e-7)  # (I - U Uᵀ) W μ
    torch.testing.assert_close(result.errors[0], values.sum(), rtol=1e-9, atol=1e-9)


def test_pooled_feature_pools_the_covariances_of_groups():
    """Groups far apart: the pooled covariance does not see the distance, the plain one does."""
    near, far = rows(12, seed=1, mean=0.0), rows(12, seed=2, mean=0.0) + 3 * random(12, seed=5)
    accumulator = PooledAccumulator("layer", 12, group_size=1, group_weights="equal")
    accumulator.update(torch.stack([near, far]))
    given = replace(layer_data(10, near), inputs=accumulator.finish())
    metric = metric_named("pooled_feature").metric(given).columns
    assert metric is not None
    torch.testing.assert_close(metric, (covariance(near) + covariance(far)) / 2, rtol=1e-9, atol=1e-12)
    assert metric.trace() < 0.5 * covariance(torch.cat([near, far])).trace()


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_pooled_feature_without_centring_is_whitened(d_out: int, d_in: int):
    """Inputs of mean zero in one group: both are PCA of the outputs, so no choice between the two names can win anything."""
    given = layer_data(d_out, rows(d_in, mean=0.0))
    pooled, whitened = factorized("pooled_feature", given, centred=False), factorized("whitened", given)
    count = given.inputs.count
    torch.testing.assert_close(pooled.errors * (count - 1) / count, whitened.errors, rtol=1e-9, atol=1e-9 * float(whitened.errors[0]))
    for rank in range(1, pooled.max_rank + 1):
        ours, theirs = pooled.slice(rank), whitened.slice(rank)
        torch.testing.assert_close(ours.ups[0] @ ours.down, theirs.ups[0] @ theirs.down, rtol=1e-9, atol=1e-9)


def test_pooled_feature_with_centring_is_not_whitened_where_the_mean_is_not_zero():
    given = layer_data(24, rows(16, mean=2.0))
    ours, theirs = factorized("pooled_feature", given).slice(4), factorized("whitened", given).slice(4)
    assert (ours.ups[0] @ ours.down - theirs.ups[0] @ theirs.down).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["two_sided", "two_sided_half"])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_two_sided_with_white_gradients_is_whitened(name: str, d_out: int, d_in: int):
    given = layer_data(d_out, rows(d_in))
    assert given.outputs is not None
    given = replace(given, outputs=replace(given.outputs, gradient=torch.eye(d_out, dtype=torch.float64)))
    ours, theirs = factorized(name, given, damping=Damping(rows=0.0), centred=False), factorized("whitened", given)
    torch.testing.assert_close(ours.errors, theirs.errors / 2, rtol=1e-9, atol=1e-9 * float(theirs.errors[0]))
    for rank in range(1, ours.max_rank + 1):
        mine, other = ours.slice(rank), theirs.slice(rank)
        torch.testing.assert_close(mine.ups[0] @ mine.down, other.ups[0] @ other.down, rtol=1e-9, atol=1e-9)


def test_two_sided_minds_what_the_loss_minds():
    """An output that no gradient reaches is given up first; whitened keeps it."""
    x, g = rows(16), gradients(24)
    g[:, 7] = 0
    given = layer_data(24, x, g=g)
    ours, theirs = factorized("two_sided", given).slice(8), factorized("whitened", given).slice(8)
    gone = [(given.weight - f.ups[0] @ f.down)[7].norm() for f in (ours, theirs)]
    assert gone[0] > 1.2 * gone[1]


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_fisher_rows_with_constant_weights_is_weight_svd(d_out: int, d_in: int):
    given = layer_data(d_out, rows(d_in))
    assert given.outputs is not None
    given = replace(given, outputs=replace(given.outputs, fisher_rows=torch.full((d_out,), 3.0, dtype=torch.float64)))
    ours, theirs = factorized("fisher_rows", given, damping=Damping(rows=0.0)), factorized("weight_svd", given)
    torch.testing.assert_close(ours.errors, 3 * theirs.errors, rtol=1e-9, atol=1e-9 * float(theirs.errors[0]))
    for rank in range(1, ours.max_rank + 1):
        mine, other = ours.slice(rank), theirs.slice(rank)
        torch.testing.assert_close(mine.ups[0] @ mine.down, other.ups[0] @ other.down, rtol=1e-9, atol=1e-9)


def test_activation_scaled_with_equal_magnitudes_is_weight_svd():
    given = layer_data(24, rows(16))
    given = replace(given, inputs=replace(given.inputs, absolute_mean=torch.full((16,), 0.3, dtype=torch.float64)))
    mine, other = factorized("activation_scaled", given).slice(6), factorized("weight_svd", given).slice(6)
    torch.testing.assert_close(mine.ups[0] @ mine.down, other.ups[0] @ other.down, rtol=1e-9, atol=1e-9)


# --- drift -----------------------------------------------------------------------------------------------------------


def drifted(d_out: int, d_in: int, *, centred: bool = False, mean: float = 0.7) -> tuple[Tensor, Tensor, LayerData]:
    """Return x, x' = x T + noise, and an operand that has seen both."""
    x = rows(d_in, mean=mean)
    y = x @ (torch.eye(d_in, dtype=torch.float64) + 0.3 * random(d_in, d_in, seed=4) / d_in**0.5) + 0.1 * random(len(x), d_in, seed=5) + 0.2
    cross = (x - x.mean(0)).T @ (y - y.mean(0)) / (len(x) - 1) if centred else x.T @ y / len(x)
    return x, y, replace(layer_data(d_out, x), inputs=inputs_of(y), cross=cross, dense_mean=x.mean(0))


@pytest.mark.parametrize("inner", ["whitened", "two_sided", "two_sided_half", "pooled_feature"])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_drift_aware_without_drift_is_its_inner_basis_whatever_the_damping(inner: str, d_out: int, d_in: int):
    given = layer_data(d_out, rows(d_in))
    centred = metric_named(inner).centred
    same = replace(given, cross=given.inputs.sample if centred else given.inputs.second_moment, dense_mean=given.inputs.mean)
    damping = Damping(columns=0.1)
    ours, theirs = factorized(f"drift_aware:{inner}", same, damping=damping), factorized(inner, given, damping=damping)
    torch.testing.assert_close(ours.errors, theirs.errors, rtol=1e-9, atol=1e-9 * float(theirs.errors[0]))
    for rank in range(1, ours.max_rank + 1):
        mine, other = ours.slice(rank), theirs.slice(rank)
        torch.testing.assert_close(mine.ups[0] @ mine.down, other.ups[0] @ other.down, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES[:3])
def test_drift_aware_does_no_worse_than_whitened_on_the_drifted_sample(d_out: int, d_in: int):
    x, y, given = drifted(d_out, d_in)
    damping = Damping(columns=1e-12)
    aware = factorized("drift_aware", given, damping=damping)
    others = [factorized("whitened", o, damping=damping) for o in (replace(given, inputs=inputs_of(x)), given)]
    for rank in range(1, aware.max_rank + 1):

        def error(result: object, rank: int = rank) -> float:
            factors = result.slice(rank)  # type: ignore[attr-defined]
            return float((x @ given.weight.T - y @ factors.down.T @ factors.ups[0].T).square().sum())

        assert all(error(aware) <= error(other) * (1 + 1e-9) for other in others)
    assert error(aware) < 0.9 * min(map(error, others))  # at full rank: the others have nothing left to gain there


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_drift_aware_at_full_rank_is_least_squares_from_the_drifted_inputs(d_out: int, d_in: int):
    x, y, given = drifted(d_out, d_in)
    factors = factorized("drift_aware", given, damping=Damping(columns=1e-13)).slice(min(d_out, d_in))
    expected = torch.linalg.lstsq(y, x @ given.weight.T).solution.T
    torch.testing.assert_close(factors.ups[0] @ factors.down, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_drift_aware_is_reduced_rank_regression(rank: int):
    """The optimum by another route: ordinary least squares, projected onto the principal components of its own predictions."""
    x, y, given = drifted(20, 14)
    factors = factorized("drift_aware", given, damping=Damping(columns=1e-13)).slice(rank)
    fitted = torch.linalg.lstsq(y, x @ given.weight.T).solution
    top = torch.linalg.eigh((y @ fitted).T @ (y @ fitted)).eigenvectors[:, -rank:]
    torch.testing.assert_close(factors.ups[0] @ factors.down, (fitted @ top @ top.T).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", ["whitened", "two_sided"])
def test_drift_aware_with_beta_0_is_its_inner_basis_on_the_drifted_inputs(inner: str):
    _, _, given = drifted(20, 14, centred=metric_named(inner).centred)
    plain = factorized(inner, given).slice(6)
    off, on = (factorized(f"drift_aware:{inner}", given, beta=beta).slice(6) for beta in (0.0, 1.0))
    torch.testing.assert_close(off.ups[0] @ off.down, plain.ups[0] @ plain.down, rtol=1e-9, atol=1e-9)
    assert (on.ups[0] @ on.down - plain.ups[0] @ plain.down).abs().max() > 1e-2


def test_beta_mixes_the_targets():
    _, _, given = drifted(20, 14)
    full = [factorized("drift_aware", given, beta=beta).slice(14) for beta in (0.0, 0.5, 1.0)]
    products = [factors.ups[0] @ factors.down for factors in full]
    torch.testing.assert_close(products[1], (products[0] + products[2]) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_centred_drift_keeps_the_mean_of_the_dense_output(rank: int):
    x, y, given = drifted(20, 12, centred=True)
    factors = factorized("drift_aware:two_sided", given).slice(rank)
    assert factors.biases[0] is not None
    result = (y @ factors.down.T @ factors.ups[0].T + factors.biases[0]).mean(0)
    torch.testing.assert_close(result, (x @ given.weight.T).mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", ["activation_scaled", "weight_svd", "fisher_rows"])
def test_drift_in_a_metric_that_is_no_moment_of_the_inputs_is_refused(inner: str):
    _, _, given = drifted(20, 14)
    with pytest.raises(ConfigError, match="Wrap whitened, pooled_feature or two_sided"):
        factorized(f"drift_aware:{inner}", given)
    factorized(f"drift_aware:{inner}", layer_data(20, rows(14)))  # outside a sequential compression there is no drift


# --- what a basis says of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METRICS, *WRAPPED])
def test_a_basis_reads_no_more_than_it_says(name: str):
    """And what it says that it needs, changes it."""
    basis = metric_named(name)
    x = rows(16)
    given = layer_data(24, x)
    expected = factorized(name, given).slice(5)

    def unchanged(other: LayerData) -> bool:
        factors = factorized(name, other).slice(5)
        return torch.equal(factors.ups[0] @ factors.down, expected.ups[0] @ expected.down)

    assert unchanged(replace(given, inputs=inputs_of(rows(16, seed=9)))) != basis.needs_data
    assert unchanged(replace(given, outputs=outputs_of(gradients(24, seed=99), x))) != basis.needs_gradients
    if not basis.needs_gradients:
        assert unchanged(replace(given, outputs=None))
    assert (expected.biases[0] is not None) == basis.centred


def test_every_basis_says_where_it_comes_from():
    for name, basis in METRICS.items():
        assert name == basis.name
        assert basis.label
        assert basis.reference
    assert len({basis.label for basis in METRICS.values()}) == len(METRICS)


def test_sequential_bases_are_those_that_correct_drift():
    names = [*METRICS, *WRAPPED]
    assert {name for name in names if metric_named(name).sequential} == {n for n in names if "drift_aware" in n or n == "refitted"}


def test_only_estimates_of_kl_are_comparable_across_matrices():
    names = [*METRICS, *WRAPPED]
    estimates = ("two_sided", "two_sided_uncentred")
    assert {name for name in names if metric_named(name).comparable} == {name for name in names if name.endswith(estimates)}


def test_an_uncentred_metric_has_the_second_moment_and_no_bias():
    x = rows(12)
    result = factorized("two_sided_uncentred", layer_data(10, x)).slice(4)
    assert result.biases == (None,)
    torch.testing.assert_close(metric_named("two_sided_uncentred").metric(layer_data(10, x)).columns, second_moment(x))


@pytest.mark.parametrize("name", ["two_sided", "two_sided_uncentred", "shared_input:two_sided_half"])
def test_shrinkage_moves_both_moments_towards_the_identity(name: str):
    given = layer_data(10, rows(12))
    plain, shrunk = (
        metric_of(CompressionConfig(basis=name, input_shrinkage=a, gradient_shrinkage=b)).metric(given) for a, b in ((0, 0), (0.1, 0.3))
    )
    for before, after, share in ((plain.columns, shrunk.columns, 0.1), (plain.rows, shrunk.rows, 0.3)):
        assert before is not None
        expected = (1 - share) * before + share * before.diagonal().mean() * torch.eye(len(before), dtype=torch.float64)
        torch.testing.assert_close(after, expected, rtol=1e-12, atol=0.0)
    assert metric_of(CompressionConfig(basis=name)) == metric_named(name)


def test_shrinkage_is_refused_where_it_has_no_meaning():
    with pytest.raises(ConfigError, match="only a two-sided metric can"):
        metric_of(CompressionConfig(basis="whitened", gradient_shrinkage=0.3))
    with pytest.raises(ConfigError, match="corrects drift, and then inputs can't be shrunk"):
        metric_of(CompressionConfig(basis="drift_aware:two_sided", input_shrinkage=0.1))
    fitted = metric_of(CompressionConfig(basis="drift_aware:two_sided", gradient_shrinkage=0.3, drift_beta=0.5))
    assert fitted.inner == replace(metric_named("two_sided"), gradient_shrinkage=0.3)  # type: ignore[attr-defined]
    assert fitted.beta == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_basis_is_found_by_the_name_that_it_gives(name: str):
    assert metric_named(name).name == name
    assert metric_named(metric_named(name).name) == metric_named(name)


def test_wrappers_around_their_default_have_the_plain_name():
    for name in WRAPPERS:
        assert metric_named(f"{name}:whitened") == METRICS[name]
    assert metric_named("drift_aware") == DriftAware()


@pytest.mark.parametrize("name", ["best", "", "whitened:two_sided", "shared_input:", "shared_input:best", ":whitened"])
def test_unknown_bases_list_the_known_ones(name: str):
    with pytest.raises(
        ConfigError, match=r"pooled_feature, weight_svd.*one of shared_input, cross_layer, drift_aware, refitted around another"
    ):
        metric_named(name)


# --- which matrices are taken together -------------------------------------------------------------------------------

BLOCKS = tuple(
    MatrixShape(f"{depth}.{kind}", kind, depth, 8, 8 if kind != "down" else 20, False, f"{depth}.{group}")
    for depth in range(5)
    for kind, group in {"q": "q", "k": "q", "v": "q", "o": "o", "down": "down"}.items()
)


def test_shared_inputs_are_stacked():
    names = ["+".join(shape.kind for shape in group) for group in metric_named("shared_input").grouping(BLOCKS)]
    assert names == ["q+k+v", "o", "down"] * 5
    assert by_input(BLOCKS) == metric_named("data_free_joint").grouping(BLOCKS) == metric_named("drift_aware:shared_input").grouping(BLOCKS)


def test_neighbouring_layers_are_stacked_by_type():
    groups = metric_named("cross_layer").grouping(BLOCKS)
    assert sorted({len(group) for group in groups}) == [1, 2]  # of five blocks the last stays alone
    assert all(len({(shape.kind, shape.d_in) for shape in group}) == 1 for group in groups)
    assert {tuple(shape.depth for shape in group) for group in groups} == {(0, 1), (2, 3), (4,)}


@pytest.mark.parametrize("name", ["weight_svd", "two_sided", "drift_aware"])
def test_single_bases_stack_nothing(name: str):
    assert metric_named(name).grouping(BLOCKS) == tuple((shape,) for shape in BLOCKS)


@pytest.mark.parametrize("name", METRICS)
def test_every_matrix_is_in_one_unit(name: str):
    members = [shape.name for group in metric_named(name).grouping(BLOCKS) for shape in group]
    assert sorted(members) == sorted(shape.name for shape in BLOCKS)

import pytest
import torch

from lowrank_core.accounting import MatrixShape
from lowrank_core.bases import BASES, FactorBasis
from lowrank_core.errors import NumericalError, RankError
from lowrank_core.linalg import square_root
from lowrank_core.moments import InputStatistics, PooledAccumulator
from lowrank_core.views.search import BASES as OFFERED

TOLERANCE = 1e-9  # float64, decompositions of matrices of a few dozen rows
SHAPES = [(24, 16), (16, 24), (20, 20), (1, 12), (12, 1)]


def inputs(width: int, *, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    """Return rows with a decaying spectrum and a mean, and their statistics in one group."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1, dtype=torch.float64) ** -1.0
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    x = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scale) @ rotation + 0.7
    accumulator = PooledAccumulator("layer", width, group_size=1, group_weights="equal")
    accumulator.update(x[None])
    return x, accumulator.finish()


def matrix(d_out: int, d_in: int) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def decomposed(name: str, d_out: int, d_in: int, *, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, FactorBasis]:
    x, statistics = inputs(d_in)
    weight = matrix(d_out, d_in)
    shape = MatrixShape("layer", "layer", 0, d_out, d_in, bias, adds_bias=BASES[name].adds_bias)
    b = torch.linspace(-1, 1, d_out, dtype=torch.float64) if bias else None
    return x, weight, BASES[name].factorize(shape, weight, b, statistics)


def applied(basis: FactorBasis, rank: int, x: torch.Tensor) -> torch.Tensor:
    factors = basis.slice(rank)
    y = x @ factors.down.T @ factors.up.T
    return y if factors.bias is None else y + factors.bias


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_is_lossless(name: str, d_out: int, d_in: int, bias: bool) -> None:
    x, weight, basis = decomposed(name, d_out, d_in, bias=bias)
    dense = x @ weight.T + (torch.linspace(-1, 1, d_out, dtype=torch.float64) if bias else 0)
    torch.testing.assert_close(applied(basis, basis.max_rank, x), dense, rtol=TOLERANCE, atol=TOLERANCE)
    assert basis.max_rank == min(d_out, d_in)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
def test_errors_fall_to_zero(name: str, d_out: int, d_in: int) -> None:
    _, _, basis = decomposed(name, d_out, d_in)
    assert len(basis.errors) == basis.max_rank + 1
    assert (basis.errors.diff() <= 0).all()
    assert basis.errors[-1] == 0


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES[:3])
def test_weight_svd_leaves_the_tail_of_the_singular_values(d_out: int, d_in: int) -> None:
    _, weight, basis = decomposed("weight_svd", d_out, d_in)
    for rank in range(1, basis.max_rank + 1):
        factors = basis.slice(rank)
        left = (weight - factors.up @ factors.down).square().sum()
        torch.testing.assert_close(left, basis.errors[rank], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("d_out", "d_in"), SHAPES[:3])
def test_pooled_feature_leaves_the_tail_of_the_feature_eigenvalues(d_out: int, d_in: int) -> None:
    x, weight, basis = decomposed("pooled_feature", d_out, d_in)
    for rank in range(1, basis.max_rank + 1):
        error = (x @ weight.T - applied(basis, rank, x)).square().sum() / (len(x) - 1)  # in sample; N - 1 as in the covariance
        torch.testing.assert_close(error, basis.errors[rank], rtol=1e-8, atol=TOLERANCE)


def test_pooled_feature_is_the_paper_s_eigendecomposition_of_the_outputs() -> None:
    x, weight, basis = decomposed("pooled_feature", 24, 16)
    y = x @ weight.T
    values, vectors = torch.linalg.eigh(torch.cov(y.T))
    for rank in (1, 5, 11):
        top = vectors[:, -rank:]
        factors = basis.slice(rank)
        torch.testing.assert_close(factors.up @ factors.down, top @ top.T @ weight, rtol=1e-7, atol=1e-8)
        assert factors.bias is not None
        expected = y.mean(0) - top @ top.T @ y.mean(0)  # b' = (I - U Uᵀ) W μ
        torch.testing.assert_close(factors.bias, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(basis.errors[0], values.sum(), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_bias_correction_keeps_the_mean_output_at_every_rank() -> None:
    x, weight, basis = decomposed("pooled_feature", 24, 16)
    for rank in (1, 4, 9):
        torch.testing.assert_close(applied(basis, rank, x).mean(0), (x @ weight.T).mean(0), rtol=TOLERANCE, atol=TOLERANCE)
        factors = basis.slice(rank)
        uncorrected = x @ factors.down.T @ factors.up.T
        assert not torch.allclose(uncorrected.mean(0), (x @ weight.T).mean(0), rtol=1e-3)


def test_no_factors_of_equal_rank_do_better_on_the_features() -> None:
    """Eckart-Young in the feature metric; plain SVD of the weight fails the same test."""
    x, weight, basis = decomposed("pooled_feature", 24, 16)
    _, _, plain = decomposed("weight_svd", 24, 16)
    centred = (x - x.mean(0)) @ weight.T
    for rank in (2, 6, 10):
        ours = (x @ weight.T - applied(basis, rank, x)).square().sum()
        best = torch.linalg.svdvals(centred)[rank:].square().sum()
        torch.testing.assert_close(ours, best, rtol=1e-8, atol=TOLERANCE)
        assert (x @ weight.T - applied(plain, rank, x)).square().sum() > 1.05 * ours


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [1, 7, 13])
def test_a_slice_is_what_a_decomposition_for_that_rank_gives(name: str, rank: int) -> None:
    """Computed for one rank alone, by another route: the r largest directions of W Wᵀ, or of W C Wᵀ."""
    _, weight, basis = decomposed(name, 20, 20)
    _, statistics = inputs(20)
    metric = weight @ weight.T if name == "weight_svd" else weight @ statistics.pooled @ weight.T
    start = torch.randn(20, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top = start
    for _ in range(4000):  # subspace iteration: it never sees the directions after the first r
        top = torch.linalg.qr(metric @ top).Q
    factors = basis.slice(rank)
    torch.testing.assert_close(factors.up @ factors.down, top @ (top.T @ weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [0, -1, 17])
def test_ranks_outside_the_limits_are_refused(name: str, rank: int) -> None:
    _, _, basis = decomposed(name, 24, 16)
    with pytest.raises(RankError, match=r"layer: rank must be in \[1, 16\]"):
        basis.slice(rank)


@pytest.mark.parametrize("name", BASES)
def test_fewer_tokens_than_dimensions_stay_finite(name: str) -> None:
    _, statistics = inputs(16, tokens=5)
    basis = BASES[name].factorize(MatrixShape("layer", "layer", 0, 8, 16), matrix(8, 16), None, statistics)
    assert torch.isfinite(basis.up).all()
    assert torch.isfinite(basis.down).all()
    assert torch.isfinite(basis.errors).all()


@pytest.mark.parametrize("name", BASES)
def test_zero_weights_and_dead_inputs_stay_finite(name: str) -> None:
    _, statistics = inputs(16)
    basis = BASES[name].factorize(MatrixShape("layer", "layer", 0, 8, 16), torch.zeros(8, 16, dtype=torch.float64), None, statistics)
    factors = basis.slice(3)
    assert not (factors.up @ factors.down).any()
    assert not basis.errors.any()


@pytest.mark.parametrize("name", BASES)
def test_nan_weights_name_the_layer(name: str) -> None:
    _, statistics = inputs(16)
    weight = matrix(8, 16)
    weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="layer: NaN or Inf"):
        BASES[name].factorize(MatrixShape("layer", "layer", 0, 8, 16), weight, None, statistics)


def test_every_basis_says_where_it_comes_from() -> None:
    for name, method in BASES.items():
        assert name == method.name
        assert method.label
        assert method.reference


def test_the_dashboard_which_imports_no_torch_offers_the_same_bases() -> None:
    assert {name: (b.label, b.adds_bias) for name, b in BASES.items()} == {name: (b.label, b.adds_bias) for name, b in OFFERED.items()}


def test_a_square_root_squares_back() -> None:
    x, statistics = inputs(12)
    root = square_root(statistics.sample, "layer")
    torch.testing.assert_close(root @ root, torch.cov(x.T), rtol=TOLERANCE, atol=TOLERANCE)

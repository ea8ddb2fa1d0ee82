import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_core.accounting import MatrixShape, allocated_parameters, budget_for_ratio, rank_for_ratio
from lowrank_core.errors import BudgetError, RankError
from lowrank_core.models import LowRankLinear

widths = st.integers(1, 300)


@given(widths, widths, st.booleans(), st.integers(1, 300))
def test_parameters_are_what_the_built_module_holds(d_out: int, d_in: int, bias: bool, rank: int) -> None:
    shape = MatrixShape("w", "w", 0, d_out, d_in, bias)
    rank = min(rank, shape.max_rank)
    with torch.device("meta"):
        dense = torch.nn.Linear(d_in, d_out, bias=bias)
        factored = LowRankLinear(d_in, d_out, rank, bias=bias)
    assert shape.parameters(None) == sum(p.numel() for p in dense.parameters())
    assert shape.parameters(rank) == sum(p.numel() for p in factored.parameters())


def test_a_bias_that_the_basis_adds_is_counted() -> None:
    plain = MatrixShape("w", "w", 0, 10, 20)
    centred = MatrixShape("w", "w", 0, 10, 20, adds_bias=True)
    assert centred.parameters(3) - plain.parameters(3) == 10
    assert centred.parameters(None) == plain.parameters(None)
    with_bias = MatrixShape("w", "w", 0, 10, 20, bias=True, adds_bias=True)
    assert with_bias.parameters(3) - plain.parameters(3) == 10  # it replaces the old one


@given(widths, widths, st.booleans(), st.booleans())
def test_break_even_is_the_last_rank_that_is_cheaper_than_dense(d_out: int, d_in: int, bias: bool, adds: bool) -> None:
    shape = MatrixShape("w", "w", 0, d_out, d_in, bias, adds)
    rank = shape.break_even_rank
    if rank:
        assert shape.parameters(rank) < shape.dense_parameters
    if rank < shape.max_rank:
        assert shape.parameters(rank + 1) >= shape.dense_parameters


def test_the_ratio_is_what_is_removed_not_what_is_kept() -> None:
    assert rank_for_ratio(100, 100, 0.2) == 40  # 8000 parameters kept, 200 for each rank
    assert rank_for_ratio(100, 100, 0.8) == 10
    assert budget_for_ratio([MatrixShape("w", "w", 0, 100, 100)], 0.2) == 8000


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.6, 0.7])
def test_rounding_of_the_ratio_costs_no_rank(ratio: float) -> None:
    # (1 - 0.3) * 1000 is 700.0 in exact arithmetic and 699.9999… or 700.0000…1 in floating point
    assert budget_for_ratio([MatrixShape("w", "w", 0, 10, 100)], ratio) == round((1 - ratio) * 1000)


@given(widths, widths, st.floats(0.01, 1.2))
def test_a_rank_for_a_price_is_the_largest_that_fits(d_out: int, d_in: int, share: float) -> None:
    shape = MatrixShape("w", "w", 0, d_out, d_in)
    price = share * shape.dense_parameters
    rank = shape.rank_for_parameters(price)
    if rank is None:
        assert price >= shape.dense_parameters or shape.break_even_rank == 0
        return
    assert rank == 1 or shape.parameters(rank) <= price + 1
    if rank < shape.break_even_rank:
        assert shape.parameters(rank + 1) > price


@pytest.mark.parametrize("rank", [0, -1, 11])
def test_a_rank_outside_its_limits_names_the_layer_and_the_limits(rank: int) -> None:
    with pytest.raises(RankError, match=r"mlp\.up: rank must be in \[1, 10\]"):
        MatrixShape("mlp.up", "up", 0, 10, 20).parameters(rank)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_budget_needs_a_ratio_below_one(ratio: float) -> None:
    with pytest.raises(BudgetError, match="must be in"):
        budget_for_ratio([MatrixShape("w", "w", 0, 10, 10)], ratio)


def test_flops_count_two_for_a_multiply_add() -> None:
    shape = MatrixShape("w", "w", 0, 10, 20, bias=True)
    assert shape.flops_per_token(None) == 400
    assert shape.flops_per_token(3) == 180


def test_a_missing_name_is_dense() -> None:
    shapes = [MatrixShape("a", "a", 0, 10, 10), MatrixShape("b", "b", 0, 10, 10)]
    assert allocated_parameters(shapes, {"a": 2}) == 40 + 100

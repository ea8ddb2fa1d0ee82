"""Counts are exact, and a form is never chosen that costs more than the dense matrix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_core.errors import BudgetError, ConfigError, RankError
from lowrank_core.parameters import STORAGES, HeadUnit, MatrixShape, Unit, allocated_parameters, budget_for_ratio, dense_parameters


def single(d_out: int, d_in: int, bias: bool = False, *, adds_bias: bool = False, storage: str = "factored") -> Unit:
    return Unit((MatrixShape("w", "w", 0, d_out, d_in, bias),), storage, adds_bias)


@st.composite
def units(draw: st.DrawFn) -> Unit:
    """Single matrices, stacks and heads of any shape."""
    sizes, flags = st.integers(1, 40), st.booleans()
    if draw(flags):
        d_in = draw(sizes)
        members = tuple(MatrixShape(f"w{i}", "w", 0, draw(sizes), d_in, draw(flags)) for i in range(draw(st.integers(1, 3))))
        return Unit(members, draw(st.sampled_from(sorted(STORAGES))), draw(flags))
    groups, repeat, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    width = draw(st.integers(2 * dim, 40))  # below, a price may fall as the rank rises: r·(n - r)
    value = MatrixShape("v", "v", 0, groups * dim, width, draw(flags))
    output = MatrixShape("o", "o", 0, draw(sizes), groups * repeat * dim, draw(flags))
    return HeadUnit((value, output), adds_bias=draw(flags), heads=groups * repeat, groups=groups, head_dim=dim)


def test_the_price_of_plain_factors_is_as_published():
    unit = single(30, 20, bias=True)
    assert unit.dense_parameters == 30 * 20 + 30
    assert unit.parameters(None) == 630
    assert unit.parameters(7) == 7 * (30 + 20) + 30
    assert single(30, 20, adds_bias=True).parameters(7) == 7 * 50 + 30
    assert single(10, 20).break_even_rank == 6  # 6·30 < 200 <= 7·30


def test_pivoted_factors_save_the_square_of_the_rank():
    unit = single(30, 20, storage="pivoted")
    assert unit.parameters(7) == 7 * (30 + 20 - 7) + 7
    assert unit.stored(7) == (7 * 43, 7)
    assert unit.bytes(7, itemsize=2) == 2 * 7 * 43 + 4 * 7
    assert unit.break_even_rank == 18  # 18·32 + 18 = 594 < 600 <= 19·31 + 19: the indices come on top


def test_a_stack_shares_its_input_side():
    stack = Unit((MatrixShape("q", "q_proj", 0, 12, 20), MatrixShape("k", "k_proj", 0, 6, 20, True)))
    assert (stack.name, stack.kind) == ("q+k", "q_proj+k_proj")
    assert stack.parameters(5) == 5 * (12 + 6 + 20) + 6
    assert stack.dense_parameters == 18 * 20 + 6


def test_heads_save_their_gauge_even_at_full_rank():
    value, output = MatrixShape("v", "v", 0, 2 * 8, 64), MatrixShape("o", "o", 0, 48, 4 * 8)
    unit = HeadUnit((value, output), heads=4, groups=2, head_dim=8)
    assert unit.parameters(8) == unit.dense_parameters - 2 * 8 * 8 + 2 * 8
    assert unit.break_even_rank == 8
    assert unit.parameters(3) == 2 * 3 * (64 - 3) + 4 * 3 * 48 + 2 * 3


@given(units())
def test_prices_rise_with_the_rank_and_break_even_is_the_last_below_dense(unit: Unit):
    prices = [unit.parameters(rank) for rank in range(1, unit.max_rank + 1)]
    cheaper = [price for price in prices if price < unit.dense_parameters]
    assert len(cheaper) == unit.break_even_rank
    assert prices[: len(cheaper)] == sorted(set(cheaper))


@given(units(), st.floats(0, 4000))
def test_the_rank_for_a_price_is_the_largest_that_fits(unit: Unit, price: float):
    rank = unit.rank_for_parameters(price)
    if rank is None:
        assert price >= unit.dense_parameters or unit.break_even_rank == 0
        return
    assert rank == 1 or unit.parameters(rank) <= price + 1e-6
    if rank < unit.break_even_rank:
        assert unit.parameters(rank + 1) > price


@pytest.mark.parametrize("rank", [0, -1, 11])
def test_a_rank_outside_its_limits_is_refused(rank: int):
    unit = Unit((MatrixShape("mlp.up", "up", 0, 10, 20),))
    with pytest.raises(RankError, match=r"mlp\.up: rank must be in \[1, 10\]"):
        unit.parameters(rank)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.7])
def test_a_budget_is_the_rounded_share(ratio: float):
    assert budget_for_ratio([single(10, 100)], ratio) == round((1 - ratio) * 1000)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 20])
def test_a_ratio_is_what_is_removed(ratio: float):
    with pytest.raises(BudgetError, match=r"must be in \[0, 1\)"):
        budget_for_ratio([single(10, 10)], ratio)


def test_flops_count_what_is_multiplied():
    unit = single(10, 20, bias=True)
    assert unit.flops_per_token(None) == 400
    assert unit.flops_per_token(3) == 180
    assert single(10, 20, storage="pivoted").flops_per_token(3) == 2 * 3 * 27


def test_alternatives_are_counted_once():
    q, k = MatrixShape("q", "q", 0, 10, 10), MatrixShape("k", "k", 0, 10, 10)
    alternatives = [Unit((q,)), Unit((k,)), Unit((q, k))]
    assert dense_parameters(alternatives) == 200
    assert allocated_parameters(alternatives, {"q": 2}) == 40 + 100
    assert allocated_parameters(alternatives, {"q+k": 2}) == 60
    with pytest.raises(ConfigError, match="q is compressed twice"):
        allocated_parameters(alternatives, {"q+k": 2, "q": 3})


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(("d_out", "d_in"), [(1000, 1000), (1000, 300)])
def test_the_pivoted_rank_of_a_budget_solves_its_quadratic_equation(kept: float, d_out: int, d_in: int):
    """r = ((m + n) - √((m + n)² - 4 m n κ)) / 2, docs/methods.md §4, but for the indices; at κ = 0.8 a square layer carries 0.553 d."""
    rank = single(d_out, d_in, storage="pivoted").rank_for_parameters(kept * d_out * d_in)
    both = d_out + d_in
    assert rank == pytest.approx((both - (both**2 - 4 * d_out * d_in * kept) ** 0.5) / 2, abs=3)
    if (kept, d_in) == (0.8, 1000):
        assert rank == pytest.approx(553, abs=3)
        assert single(d_out, d_in).rank_for_parameters(kept * d_out * d_in) == 400


def test_heads_count_their_biases_and_what_they_multiply():
    value, output = MatrixShape("v", "v", 0, 2 * 8, 64, True), MatrixShape("o", "o", 0, 48, 4 * 8)
    unit = HeadUnit((value, output), heads=4, groups=2, head_dim=8)
    assert unit.parameters(3) == 2 * 3 * (64 - 3) + 4 * 3 * 48 + 2 * 3 + 2 * 3
    assert HeadUnit((value, output), adds_bias=True, heads=4, groups=2, head_dim=8).parameters(3) == unit.parameters(3) + 48
    assert unit.flops_per_token(3) == 2 * (2 * 3 * 64 + 4 * 3 * 48)  # the identity columns are multiplied, too
    assert unit.bytes(3, itemsize=2) == 2 * (unit.parameters(3) - 6) + 4 * 6


def test_bytes_of_the_dense_form_have_no_indices():
    assert single(10, 20, bias=True, storage="pivoted").bytes(None, itemsize=2) == 2 * 210

"""Pivoted factors and the gauge of heads: nothing is lost, whatever the factors are like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowrank_core.errors import NumericalError, RankError
from lowrank_core.layers.pivoting import PivotedFactors, fix_gauge, gather_order, pivot, select_rows

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _product(factors: PivotedFactors) -> Tensor:
    """The stacked matrix that pivoted factors stand for."""
    members = []
    for offset, own, coefficients in zip(factors.offsets, factors.pivots, factors.coefficients, strict=True):
        matrix = torch.empty(len(own) + len(coefficients), factors.rows.shape[1], dtype=torch.float64)
        others = torch.ones(len(matrix), dtype=torch.bool)
        others[own] = False
        matrix[own] = factors.rows[offset : offset + len(own)]
        matrix[others] = coefficients @ factors.rows
        members.append(matrix)
    return torch.cat(members)


@pytest.mark.parametrize("sizes", [(9,), (6, 4, 2), (1, 8)], ids=str)
@pytest.mark.parametrize("rank", range(1, 10))
def test_pivoting_loses_nothing_and_saves_the_square_of_the_rank(sizes: tuple[int, ...], rank: int):
    ups, down = [_random(size, rank, seed=size) for size in sizes], _random(rank, 12)
    factors = pivot(ups, down)
    torch.testing.assert_close(_product(factors), torch.cat(ups) @ down, **TIGHT)
    elements = factors.rows.numel() + sum(own.numel() for own in factors.coefficients)
    assert elements == rank * (sum(sizes) + 12 - rank)
    assert sum(map(len, factors.pivots)) == rank
    assert all((own.diff() > 0).all() for own in factors.pivots)
    assert factors.offsets == tuple(sum(map(len, factors.pivots[:member])) for member in range(len(sizes)))


def test_a_member_can_have_all_pivots_or_none():
    strong, weak = _random(4, 4), 1e-3 * _random(5, 4, seed=1)
    factors = pivot([weak, strong], _random(4, 6))
    assert [len(own) for own in factors.pivots] == [0, 4]
    assert [len(own) for own in factors.coefficients] == [5, 0]
    torch.testing.assert_close(_product(factors), torch.cat([weak, strong]) @ _random(4, 6), **TIGHT)


DEFICIENT: dict[str, Callable[[Tensor], Tensor]] = {
    "a column of zeros": lambda up: up.index_fill(1, torch.tensor([2]), 0.0),
    "rows of zeros": lambda up: up.index_fill(0, torch.arange(0, 8), 0.0),
    "rows that repeat": lambda up: up[torch.arange(len(up)) % 3],
    "a column that repeats": lambda up: up[:, [0, 1, 2, 3, 1]],
    "zeros alone": torch.zeros_like,
    "columns of very different length": lambda up: up * torch.logspace(0, -24, 5, dtype=torch.float64),
}


@pytest.mark.parametrize("name", DEFICIENT)
def test_factors_of_a_lower_rank_lose_nothing(name: str):
    up, down = DEFICIENT[name](_random(11, 5)), _random(5, 7, seed=1)
    factors = pivot([up[:4], up[4:]], down)
    torch.testing.assert_close(_product(factors), up @ down, **TIGHT)
    assert factors.largest_coefficient < 20


def test_independent_rows_are_found_among_repeated_ones():
    up = torch.cat([_random(1, 3).expand(6, 3), _random(2, 3, seed=1)])
    assert torch.linalg.matrix_rank(up[select_rows(up).pivots]) == 3


def test_coefficients_stay_small_and_do_not_depend_on_the_basis():
    up = torch.linalg.qr(_random(200, 60))[0]
    chosen = select_rows(up)
    assert chosen.coefficients.abs().max() < 5
    torch.testing.assert_close(chosen.coefficients @ up[chosen.pivots], up[chosen.rest], **TIGHT)
    scaled = select_rows(up * torch.logspace(0, -8, 60, dtype=torch.float64))
    assert torch.equal(scaled.pivots, chosen.pivots)
    torch.testing.assert_close(scaled.coefficients, chosen.coefficients)
    first = torch.arange(60)  # what the choice is for
    assert torch.linalg.solve(up[first].T, up[60:].T).abs().max() > 5 * chosen.coefficients.abs().max()


def test_factors_that_can_not_be_pivoted_are_told():
    with pytest.raises(RankError, match=r"q_proj: rank must be in \[1, 3\], got 4"):
        pivot([_random(3, 4)], _random(4, 9), "q_proj")
    with pytest.raises(NumericalError, match="q_proj: NaN or Inf"):
        pivot([_random(5, 4).fill_(torch.nan)], _random(4, 9), "q_proj")


@given(st.sets(st.integers(0, 11)))
def test_gathering_puts_rows_back(chosen: set[int]):
    pivots = torch.tensor(sorted(chosen), dtype=torch.int32)
    rest = torch.tensor([row for row in range(12) if row not in chosen], dtype=torch.int32)
    assert torch.cat([pivots, rest])[gather_order(pivots, 12)].tolist() == list(range(12))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=14))
def test_gathering_by_damaged_numbers_stays_in_range(numbers: list[int]):
    order = gather_order(torch.tensor(numbers, dtype=torch.int32), 12)
    assert order.shape == (12,)
    assert 0 <= int(order.min()) <= int(order.max()) < 12


def _value_matrix(rest: Tensor, pivots: Tensor, n: int) -> Tensor:
    matrix = torch.empty(len(pivots), n, dtype=torch.float64)
    others = torch.ones(n, dtype=torch.bool)
    others[pivots] = False
    matrix[:, pivots] = torch.eye(len(pivots), dtype=torch.float64)
    matrix[:, others] = rest
    return matrix


@pytest.mark.parametrize("heads", [2, 6])
def test_the_gauge_changes_nothing_between_value_and_output(heads: int):
    values, biases, outputs = _random(2, 3, 10), _random(2, 3, seed=1), _random(heads, 7, 3, seed=2)
    fixed = fix_gauge(values, biases, outputs)
    assert fixed.rest.shape == (2, 3, 7)
    assert fixed.biases is not None
    for head in range(heads):
        group = head // (heads // 2)
        matrix = _value_matrix(fixed.rest[group], fixed.pivots[group], 10)
        torch.testing.assert_close(fixed.outputs[head] @ matrix, outputs[head] @ values[group], **TIGHT)
        torch.testing.assert_close(fixed.outputs[head] @ fixed.biases[group], outputs[head] @ biases[group], **TIGHT)


def test_values_of_a_lower_rank_keep_a_bias_that_they_reach():
    values, outputs = _random(1, 3, 10).index_fill(1, torch.tensor([1]), 0.0), _random(2, 7, 3)
    reached = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    fixed = fix_gauge(values, reached, outputs)
    assert fixed.biases is not None
    torch.testing.assert_close(fixed.outputs @ fixed.biases[0], outputs @ reached[0], **TIGHT)
    matrix = _value_matrix(fixed.rest[0], fixed.pivots[0], 10)
    torch.testing.assert_close(fixed.outputs @ matrix, outputs @ values[0], **TIGHT)
    with pytest.raises(NumericalError, match="v_proj: the values have a lower rank than 3, and their bias lies outside"):
        fix_gauge(values, torch.ones_like(reached), outputs, "v_proj")

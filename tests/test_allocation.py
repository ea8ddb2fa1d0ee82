import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.accounting import MatrixShape, allocated_parameters, budget_for_ratio
from lowrank_core.allocation import ALLOCATORS, allocate, allocation_from_ranks, module_group, project, read_ranks
from lowrank_core.errors import BudgetError, ConfigError, RankError

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn"]


@st.composite
def models(draw: st.DrawFn) -> list[MatrixShape]:
    adds_bias = draw(st.booleans())
    count = draw(st.integers(1, 8))
    return [
        MatrixShape(
            f"layer.{index}",
            draw(st.sampled_from(KINDS)),
            index,
            draw(st.integers(4, 200)),
            draw(st.integers(4, 200)),
            bias=draw(st.booleans()),
            adds_bias=adds_bias,
        )
        for index in range(count)
    ]


def cheapest_step(matrices: list[MatrixShape], ranks: dict[str, int | None], keep: set[str]) -> int | None:
    steps = []
    for matrix in matrices:
        rank = ranks[matrix.name]
        if rank is None or matrix.name in keep:
            continue
        following = rank + 1 if rank < matrix.break_even_rank else None
        steps.append(matrix.parameters(following) - matrix.parameters(rank))
    return min(steps, default=None)


@settings(max_examples=300, deadline=None)
@given(models(), st.floats(0.01, 0.95), st.data())
def test_a_projection_meets_the_budget_exactly(matrices: list[MatrixShape], ratio: float, data: st.DataObject) -> None:
    keep = {m.name for m in matrices if data.draw(st.booleans())}
    wishes = {m.name: data.draw(st.floats(0.2, 1.0)) for m in matrices}
    budget = budget_for_ratio(matrices, ratio)
    least = sum(m.dense_parameters if m.name in keep or not m.break_even_rank else m.parameters(1) for m in matrices)
    if least > budget:
        with pytest.raises(BudgetError, match="can't be met"):
            project(matrices, wishes, ratio, keep_dense=keep)
        return
    found = project(matrices, wishes, ratio, keep_dense=keep)
    assert found.parameters == allocated_parameters(matrices, found.ranks) <= budget
    assert all(found.ranks[name] is None for name in keep)
    step = cheapest_step(matrices, dict(found.ranks), keep)
    assert step is None or found.parameters + step > budget


@settings(max_examples=100, deadline=None)
@given(models(), st.floats(0.05, 0.8), st.floats(0.1, 7.0))
def test_only_ratios_between_multipliers_matter(matrices: list[MatrixShape], ratio: float, factor: float) -> None:
    wishes = {m.name: 0.2 + 0.1 * (index % 5) for index, m in enumerate(matrices)}
    try:
        first = project(matrices, wishes, ratio)
    except BudgetError:
        return
    second = project(matrices, {name: factor * wish for name, wish in wishes.items()}, ratio)
    # rounding of the scale may move a single rank, never the total by more than a step
    assert abs(first.parameters - second.parameters) <= max(m.rank_step + m.fixed_parameters for m in matrices)


def test_uniform_gives_equal_shapes_equal_ranks() -> None:
    matrices = [MatrixShape(f"{i}", "up_proj", i, 64, 96) for i in range(5)]
    ranks = set(allocate("uniform", matrices, 0.4).ranks.values())
    assert len(ranks) <= 2
    values = sorted(rank for rank in ranks if rank is not None)
    assert values[-1] - values[0] <= 1


def test_lord_manual_keeps_less_of_q_and_k() -> None:
    matrices = [MatrixShape(kind, kind, 0, 128, 128) for kind in ("q_proj", "k_proj", "o_proj", "up_proj")]
    ranks = allocate("lord_manual", matrices, 0.5).ranks
    assert ranks["q_proj"] == ranks["k_proj"] < ranks["o_proj"] == ranks["up_proj"]
    assert ranks["q_proj"] / ranks["o_proj"] == pytest.approx(0.7 / 0.8, abs=0.03)


def test_a_wish_above_its_share_ends_dense() -> None:
    matrices = [MatrixShape("a", "a", 0, 64, 64), MatrixShape("b", "b", 0, 64, 64)]
    found = project(matrices, {"a": 1.0, "b": 0.2}, 0.2)
    assert found.ranks["a"] is None
    assert found.ranks["b"] is not None


def test_a_ratio_out_of_reach_says_what_is_possible() -> None:
    matrices = [MatrixShape("v", "v_proj", 0, 64, 64), MatrixShape("q", "q_proj", 0, 64, 64)]
    with pytest.raises(BudgetError, match=r"0\.7 can't be met.*remove only 0\.48.*Lower the ratio"):
        allocate("uniform", matrices, 0.7, keep_dense=["v"])


def test_q_and_k_share_a_group_and_unknown_types_are_their_own() -> None:
    assert module_group("q_proj") == module_group("k_proj") == "qk"
    assert module_group("c_attn") == "c_attn"


def test_every_allocator_says_where_it_comes_from() -> None:
    for name, method in ALLOCATORS.items():
        assert name == method.name
        assert method.label
        assert method.reference


def test_unknown_allocators_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="uniform, lord_manual"):
        allocate("best", [MatrixShape("a", "a", 0, 8, 8)], 0.1)


def test_ranks_survive_a_file(tmp_path: Path) -> None:
    matrices = [MatrixShape("a", "a", 0, 64, 64), MatrixShape("b", "b", 0, 64, 64)]
    found = allocate("uniform", matrices, 0.3)
    path = tmp_path / "ranks.json"
    path.write_text(found.to_json())
    assert read_ranks(path) == found.ranks
    path.write_text(json.dumps(dict(found.ranks)))
    assert allocation_from_ranks("manual", matrices, read_ranks(path)).parameters == found.parameters


@pytest.mark.parametrize("body", ["[1]", '{"a": "x"}', '{"a": 1.5}', '{"a": true}', "not json"])
def test_a_file_of_anything_else_is_refused(tmp_path: Path, body: str) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(body)
    with pytest.raises(ConfigError, match="ranks"):
        read_ranks(path)


def test_given_ranks_are_checked() -> None:
    matrices = [MatrixShape("a", "a", 0, 64, 32)]
    with pytest.raises(RankError, match=r"a: rank must be in \[1, 32\], got 33"):
        allocation_from_ranks("manual", matrices, {"a": 33})
    with pytest.raises(ConfigError, match="'z' is no compressible layer"):
        allocation_from_ranks("manual", matrices, {"z": 3})


def test_a_rank_that_would_cost_more_than_the_matrix_is_stored_dense() -> None:
    matrices = [MatrixShape("a", "a", 0, 64, 64)]
    assert allocation_from_ranks("manual", matrices, {"a": 32}).ranks["a"] is None  # 32 · 128 = 64 · 64
    assert allocation_from_ranks("manual", matrices, {"a": 31}).ranks["a"] == 31

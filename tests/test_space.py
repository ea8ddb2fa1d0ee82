import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.accounting import MatrixShape, budget_for_ratio
from lowrank_core.allocation import allocate
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.search.space import BASELINES, SearchSpace, value_layers

KINDS = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64), "gate_proj": (160, 64), "up_proj": (160, 64)}
LLAMA = tuple(
    MatrixShape(f"layers.{depth}.{kind}", kind, depth, *shape, adds_bias=True)
    for depth in range(3)
    for kind, shape in {**KINDS, "down_proj": (64, 160)}.items()
)


def test_five_variables_with_the_value_projections_kept_dense() -> None:
    space = SearchSpace(LLAMA, 0.3, value_layers(LLAMA))
    assert space.groups == ("qk", "o", "gate", "up", "down")
    assert SearchSpace(LLAMA, 0.3).groups == ("qk", "v", "o", "gate", "up", "down")


def test_the_bounds_are_the_paper_s() -> None:
    distributions = SearchSpace(LLAMA, 0.3).distributions()
    assert {(d.low, d.high) for d in distributions.values()} == {(0.2, 1.0)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_baseline_s_point_gives_the_baseline_s_ranks(name: str, keep: bool) -> None:
    kept = value_layers(LLAMA) if keep else ()
    space = SearchSpace(LLAMA, 0.3, kept)
    point = space.baseline(name)
    assert set(point) == set(space.groups)
    assert space.allocation(point).ranks == allocate(name, LLAMA, 0.3, keep_dense=kept).ranks


@settings(max_examples=100, deadline=None)
@given(st.floats(0.05, 0.7), st.lists(st.floats(0.2, 1.0), min_size=5, max_size=5))
def test_every_point_is_feasible_and_spends_the_budget(ratio: float, values: list[float]) -> None:
    space = SearchSpace(LLAMA, ratio, value_layers(LLAMA))
    found = space.allocation(dict(zip(space.groups, values, strict=True)))
    budget = budget_for_ratio(LLAMA, ratio)
    assert budget - max(m.rank_step for m in LLAMA) < found.parameters <= budget


def test_nothing_to_search_over_is_told() -> None:
    values = tuple(m for m in LLAMA if m.kind == "v_proj")
    with pytest.raises(ConfigError, match="every matrix is kept dense"):
        SearchSpace(values, 0.3, value_layers(values)).distributions()


def test_a_ratio_out_of_reach_is_told() -> None:
    space = SearchSpace(LLAMA, 0.99, value_layers(LLAMA))
    with pytest.raises(BudgetError, match="can't be met"):
        space.allocation(space.baseline("uniform"))

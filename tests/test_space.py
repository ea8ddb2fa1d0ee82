"""The search space: every projected point spends the budget; as published, a point is the kept fractions themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.accounting import MatrixShape, Unit, budget_for_ratio
from lowrank_core.allocation import allocate, allocation_from_ranks, module_group
from lowrank_core.config import CompressionConfig
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.search.space import BASELINES, LEAST, PUBLISHED_MARGIN, SearchSpace
from lowrank_core.units import plan_units, value_layers

KINDS = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64), "gate_proj": (160, 64), "up_proj": (160, 64)}
SHAPES = tuple(
    MatrixShape(f"layers.{depth}.{kind}", kind, depth, *size, input_group=f"{depth}.{'qkv' if kind[0] in 'qkv' else kind}")
    for depth in range(3)
    for kind, size in {**KINDS, "down_proj": (64, 160)}.items()
)
VALUES = value_layers(SHAPES)
LLAMA = tuple(Unit((shape,), "factored", True) for shape in SHAPES)
PIVOTED = tuple(Unit((shape,), "pivoted", True) for shape in SHAPES)
STACKED = plan_units(SHAPES, CompressionConfig(basis="shared_input"))


def test_five_variables_with_the_value_projections_kept_dense():
    assert SearchSpace(LLAMA, 0.3, VALUES).groups == ("qk", "o", "gate", "up", "down")
    assert SearchSpace(LLAMA, 0.3).groups == ("qk", "v", "o", "gate", "up", "down")


def test_a_stack_has_one_variable():
    assert SearchSpace(STACKED, 0.3, VALUES).groups == ("qk", "o", "gate", "up", "down")


def test_the_bounds_are_the_paper_s():
    distributions = SearchSpace(LLAMA, 0.3).distributions()
    assert {(d.low, d.high) for d in distributions.values()} == {(0.2, 1.0)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("units", [LLAMA, PIVOTED, STACKED], ids=["factored", "pivoted", "stacked"])
def test_a_baseline_s_point_gives_the_baseline_s_ranks(name: str, keep: bool, units: tuple[Unit, ...]):
    kept = VALUES if keep else ()
    space = SearchSpace(units, 0.3, kept)
    point = space.baseline(name)
    assert set(point) == set(space.groups)
    assert space.allocation(point).ranks == allocate(name, units, 0.3, keep_dense=kept).ranks


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([LLAMA, PIVOTED, STACKED]), st.floats(0.05, 0.7), st.lists(st.floats(0.2, 1.0), min_size=5, max_size=5))
def test_every_projected_point_is_feasible_and_spends_the_budget(units: tuple[Unit, ...], ratio: float, values: list[float]):
    space = SearchSpace(units, ratio, VALUES)
    found = space.allocation(dict(zip(space.groups, values, strict=True)))
    budget = budget_for_ratio(units, ratio)
    step = max(unit.parameters(1) for unit in units)
    assert budget - step < found.parameters <= budget
    assert space.constraints(found) == {}
    assert all(found.ranks[name] is None for name in VALUES)


def test_only_ratios_between_projected_variables_matter():
    space = SearchSpace(LLAMA, 0.4, VALUES)
    point = {group: 0.2 + 0.05 * index for index, group in enumerate(space.groups)}
    assert space.allocation(point).ranks == space.allocation({group: 2 * value for group, value in point.items()}).ranks


@pytest.mark.parametrize("projected", [True, False])
def test_ranks_are_rounded_down_to_the_multiple(projected: bool):
    space = SearchSpace(LLAMA, 0.3, VALUES, projected=projected, rank_multiple=8)
    plain = SearchSpace(LLAMA, 0.3, VALUES, projected=projected)
    point = dict.fromkeys(space.groups, 0.6)
    ranks, before = space.allocation(point).ranks, plain.allocation(point).ranks
    for name, rank in ranks.items():
        assert rank is None or rank % 8 == 0
        assert rank is None or before[name] is None or before[name] - 8 < rank <= before[name]  # type: ignore[operator]


# --- as published ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.2, 1.0), min_size=5, max_size=5), st.sampled_from([1, 8]))
def test_a_published_point_is_the_kept_fractions_themselves(values: list[float], multiple: int):
    """rank = ⌈k·m·n/(m + n)⌉, floored to a multiple of 8; a kept fraction of 1 is dense. Whatever the ratio is."""
    space = SearchSpace(LLAMA, 0.3, VALUES, projected=False, rank_multiple=multiple)
    point = dict(zip(space.groups, values, strict=True))
    found = space.allocation(point)
    assert found.ranks == SearchSpace(LLAMA, 0.9, VALUES, projected=False, rank_multiple=multiple).allocation(point).ranks
    for unit in LLAMA:
        rank, kept = found.ranks[unit.name], point.get(module_group(unit.kind), 1.0)
        if unit.name in VALUES or kept == 1:
            assert rank is None
            continue
        expected = math.ceil(kept * unit.d_out * unit.d_in / (unit.d_out + unit.d_in))
        if expected >= 8:
            expected -= expected % multiple
        if unit.parameters(min(expected, unit.max_rank)) >= unit.dense_parameters:
            assert rank is None
        else:
            assert rank == expected


def test_a_published_point_is_feasible_between_the_budget_and_a_tenth_below():
    space = SearchSpace(LLAMA, 0.3, VALUES, projected=False)

    def excess(kept: float) -> dict[str, float]:
        return space.constraints(space.allocation(dict.fromkeys(space.groups, kept)))

    assert set(excess(0.5)) == {"removes too little", "removes too much"}
    little, enough, much = excess(0.9), excess(0.62), excess(0.3)
    assert little["removes too little"] > 0 > little["removes too much"]
    assert max(enough.values()) <= 0
    assert much["removes too much"] > 0 > much["removes too little"]


def test_the_bounds_of_feasibility_are_the_ratio_and_a_tenth_more():
    space = SearchSpace(LLAMA, 0.3, projected=False)
    for removed in (0.25, 0.31, 0.39, 0.41):
        uniform = allocate("uniform", LLAMA, removed)
        found = space.constraints(allocation_from_ranks("manual", LLAMA, uniform.ranks))
        assert found["removes too little"] == pytest.approx(0.3 - uniform.compression_ratio)
        assert found["removes too much"] == pytest.approx(uniform.compression_ratio - 0.3 - PUBLISHED_MARGIN)
        assert (max(found.values()) <= 0) == (0.3 <= uniform.compression_ratio <= 0.4)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_a_published_baseline_is_feasible_up_to_rounding_and_within_the_bounds(name: str, ratio: float):
    space = SearchSpace(LLAMA, ratio, VALUES, projected=False)
    point = space.baseline(name)
    assert set(point) == set(space.groups)
    assert all(LEAST <= value <= 1 for value in point.values())
    found = space.allocation(point)
    step = max(unit.parameters(1) for unit in LLAMA) * len(LLAMA) / found.dense_parameters
    assert max(space.constraints(found).values()) <= step
    if name == "lord_manual":
        assert point["qk"] / point["o"] == pytest.approx(0.7 / 0.8)


@pytest.mark.parametrize("name", BASELINES)
def test_a_published_baseline_stays_within_the_bounds_of_its_variables(name: str):
    """At a ratio where its kept fractions would fall below the least that may be sampled."""
    space = SearchSpace(LLAMA, 0.85, projected=False)
    assert min(space.baseline(name).values()) == LEAST


# --- errors ----------------------------------------------------------------------------------------------------------


def test_nothing_to_search_over_is_told():
    values = tuple(unit for unit in LLAMA if unit.kind == "v_proj")
    with pytest.raises(ConfigError, match="every matrix is kept dense"):
        SearchSpace(values, 0.3, VALUES).distributions()


def test_a_ratio_out_of_reach_is_told():
    space = SearchSpace(LLAMA, 0.99, VALUES)
    with pytest.raises(BudgetError, match="can't be met"):
        space.allocation(space.baseline("uniform"))

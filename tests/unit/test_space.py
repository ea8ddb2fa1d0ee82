"""The search space: every projected point spends the budget. (Searches as published: test_published.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_core.allocation import allocate, allocation_from_ranks
from lowrank_core.allocation.units import plan_units, value_layers
from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.parameters import MatrixShape, Unit, budget_for_ratio
from lowrank_core.studies.depth_trials import ALPHA, GAMMA
from lowrank_core.studies.space import BASELINES, RATIO, SPREAD, SearchSpace

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


RULES = ("uniform", "lord_manual")
"""Baselines that are points of a space of kept fractions."""


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("units", [LLAMA, PIVOTED, STACKED], ids=["factored", "pivoted", "stacked"])
def test_a_baseline_s_point_gives_the_baseline_s_ranks(name: str, keep: bool, units: tuple[Unit, ...]):
    kept = VALUES if keep else ()
    space = SearchSpace(units, 0.3, kept)
    point = space.point_of(name, space.compression_ratio)
    assert set(point) == set(space.groups)
    assert space.allocation(point).ranks == allocate(name, units, 0.3, keep_dense=kept).ranks


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([LLAMA, PIVOTED, STACKED]), st.floats(0.05, 0.7), st.lists(st.floats(0.2, 1.0), min_size=5, max_size=5))
def test_every_projected_point_is_feasible_and_spends_the_budget(units: tuple[Unit, ...], ratio: float, values: list[float]):
    space = SearchSpace(units, ratio, VALUES)
    result = space.allocation(dict(zip(space.groups, values, strict=True)))
    budget = budget_for_ratio(units, ratio)
    step = max(unit.parameters(1) for unit in units)
    assert budget - step < result.parameters <= budget
    assert all(result.ranks[name] is None for name in VALUES)


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


# --- weights of errors -----------------------------------------------------------------------------------------------

ALTERNATIVES = plan_units(SHAPES, CompressionConfig(basis="two_sided", storage="pivoted", stacks=True, value_dense=False))


def curves_of(units: tuple[Unit, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Convex curves down to 0 at full rank, of different heights."""
    generator = np.random.default_rng(seed)
    result = {}
    for unit in units:
        energies = np.sort(generator.exponential(size=unit.max_rank) * generator.uniform(0.1, 10))[::-1]
        result[unit.name] = np.append(energies[::-1].cumsum()[::-1], 0.0)
    return result


def weighted(units: tuple[Unit, ...], ratio: float = 0.3, **changes: object) -> SearchSpace:
    return SearchSpace(units, ratio, variables="error_weight", curves=curves_of(units), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("units", [LLAMA, ALTERNATIVES], ids=["single", "with stacks"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_at_weights_of_one_a_point_is_marginals_own(units: tuple[Unit, ...], ratio: float):
    space = weighted(units, ratio)
    point = space.point_of("lagrangian", ratio)
    assert set(point) == set(space.distributions())
    assert set(point.values()) == {1.0}
    assert space.allocation(point).ranks == allocate("lagrangian", units, ratio, curves=space.curves).ranks


def test_the_largest_group_has_no_variable():
    assert set(weighted(LLAMA).groups) - set(weighted(LLAMA).distributions()) == {"gate"}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([LLAMA, ALTERNATIVES]), st.floats(0.1, 0.7), st.lists(st.floats(1 / SPREAD, SPREAD), min_size=5, max_size=5))
def test_every_point_of_weights_spends_the_budget(units: tuple[Unit, ...], ratio: float, values: list[float]):
    space = weighted(units, ratio)
    result = space.allocation(dict(zip(space.distributions(), values, strict=True)))
    budget = budget_for_ratio(units, ratio)
    assert budget - max(unit.parameters(1) for unit in units) < result.parameters <= budget


def test_a_heavier_group_keeps_more():
    space = weighted(LLAMA, 0.4)
    ones = space.point_of("lagrangian", 0.4)

    def kept(point: dict[str, float]) -> int:
        ranks = space.allocation(point).ranks
        return sum(unit.parameters(ranks[unit.name]) for unit in LLAMA if unit.kind == "down_proj")

    assert kept({**ones, "down": 1 / SPREAD}) < kept(ones) < kept({**ones, "down": SPREAD})


def test_the_weight_of_a_stack_lies_between_those_of_its_members():
    space = weighted(ALTERNATIVES)
    weights = dict(space._weights({**space.point_of("lagrangian", 0.3), "qk": 16.0}))
    q, k, v = (f"layers.0.{kind}" for kind in ("q_proj", "k_proj", "v_proj"))
    assert (weights[q], weights[k], weights[v]) == pytest.approx((16, 16, 1))
    assert weights[f"{q}+{k}+{v}"] == pytest.approx(8)  # three quarters of its parameters: 16^¾


# --- groups of blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected"), [(1, ("qk",)), (2, ("qk 0-1", "qk 2-2")), (3, ("qk 0-0", "qk 1-1", "qk 2-2"))])
def test_blocks_are_grouped_in_their_order(count: int, expected: tuple[str, ...]):
    space = SearchSpace(LLAMA, 0.3, VALUES, depth_groups=count)
    assert tuple(group for group in space.groups if group.startswith("qk")) == expected
    assert len(space.groups) == 5 * count


@pytest.mark.parametrize("variables", ["keep_ratio", "error_weight"])
@pytest.mark.parametrize("depth_groups", [1, 3, None])
def test_every_group_moves_its_own_matrices_alone(variables: str, depth_groups: int | None):
    space = SearchSpace(LLAMA, 0.3, VALUES, variables=variables, depth_groups=depth_groups, curves=curves_of(LLAMA))
    point = space.point_of("lagrangian" if variables == "error_weight" else "uniform", 0.3)
    covered = [space.group_of(unit) for unit in LLAMA if unit.name not in VALUES]
    assert set(covered) == set(space.groups)
    if depth_groups is None:
        assert set(space.groups) == {unit.name for unit in LLAMA} - set(VALUES)
    group = next(iter(point))
    before, after = space.allocation(point).ranks, space.allocation({**point, group: point[group] / 3}).ranks
    lost = {unit.name: (_size(before, unit) - _size(after, unit)) / unit.parameters(1) for unit in LLAMA}
    own = {unit.name for unit in LLAMA if space.group_of(unit) == group}
    assert max(lost, key=lost.__getitem__) in own  # others may lose a little: the remainder goes elsewhere


def _size(ranks: Mapping[str, int | None], unit: Unit) -> int:
    return unit.parameters(ranks[unit.name])


# --- a depth bias ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [LLAMA, ALTERNATIVES], ids=["single", "with stacks"])
def test_two_variables_weigh_errors_by_depth_and_begin_at_the_allocators_own_point(units: tuple[Unit, ...]):
    space = SearchSpace.of(units, SearchConfig(0.5, space="depth", variables="error_weight"), (), curves_of(units))
    assert {name: (bounds.low, bounds.high) for name, bounds in space.distributions().items()} == {ALPHA: (0, 3), GAMMA: (0, 7)}
    point = space.point_of("lagrangian", 0.5)
    assert space.allocation(point).ranks == allocate("lagrangian", units, 0.5, curves=space.curves).ranks
    assert {baseline.label for baseline in space.baselines()} == set(BASELINES)
    weights = dict(space._weights({ALPHA: 1.0, GAMMA: 2.0}))
    first, middle, last = (weights[f"layers.{block}.gate_proj"] for block in range(3))
    assert (first, middle, last) == pytest.approx((3.0, 1 + 2 * (1 / 2) / (1 / 2 + 1), 1.0))
    result = space.allocation({ALPHA: 1.0, GAMMA: 7.0})
    assert result.parameters <= budget_for_ratio(units, 0.5)

    def kept(ranks: Mapping[str, int | None]) -> int:
        return sum(_size(ranks, unit) for unit in units if unit.name in ranks and unit.depth == 0)

    assert kept(result.ranks) > kept(space.allocation(point).ranks)


def test_a_depth_bias_is_of_errors_and_of_several_blocks():
    with pytest.raises(ConfigError, match="choose variables `error_weight`"):
        SearchConfig(space="depth")
    with pytest.raises(ConfigError, match="ask for measured error weights as well"):
        SearchConfig(deep_weights=True)
    single = tuple(unit for unit in LLAMA if unit.depth == 0)
    with pytest.raises(ConfigError, match="one block has no depth"):
        SearchSpace.of(single, SearchConfig(space="depth", variables="error_weight"), (), curves_of(single))


def test_more_groups_than_blocks_are_told():
    with pytest.raises(ConfigError, match="the model has 3 blocks"):
        SearchSpace.of(LLAMA, SearchConfig(space="types x 4"), VALUES, None)


def test_more_variables_than_a_gaussian_process_takes_are_told():
    deep = tuple(Unit((replace(shape, name=f"{n}.{shape.name}"),)) for n in range(2) for shape in SHAPES)
    with pytest.raises(ConfigError, match=r"has 42 variables here, and a Gaussian process works up to 30\. Choose the sampler tpe"):
        SearchSpace.of(deep, SearchConfig(space="per-layer"), (), None)
    assert len(SearchSpace.of(deep, SearchConfig(space="per-layer", sampler="tpe"), (), None).groups) == 42


# --- a range of ratios -----------------------------------------------------------------------------------------------


def test_the_ratio_is_a_variable_of_a_search_over_ratios():
    space = weighted(LLAMA, 0.2, max_ratio=0.6)
    bounds = space.distributions()[RATIO]
    assert (bounds.low, bounds.high) == (0.2, 0.6)
    for ratio in (0.2, 0.4, 0.6):
        result = space.allocation({**space.point_of("lagrangian", ratio), RATIO: ratio})
        assert result.ranks == allocate("lagrangian", LLAMA, ratio, curves=space.curves).ranks


@pytest.mark.parametrize("variables", ["keep_ratio", "error_weight"])
def test_baselines_span_the_range(variables: str):
    space = SearchSpace(LLAMA, 0.2, variables=variables, max_ratio=0.6, curves=curves_of(LLAMA))
    own = "lagrangian" if variables == "error_weight" else "uniform"
    result = [baseline for baseline in space.baselines() if baseline.label == own]
    assert [round(baseline.compression_ratio, 6) for baseline in result] == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert all(baseline.point[RATIO] == baseline.compression_ratio and baseline.ranks is None for baseline in result)


# --- baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", ["keep_ratio", "error_weight"])
@pytest.mark.parametrize("units", [LLAMA, ALTERNATIVES], ids=["single", "with stacks"])
def test_each_baseline_is_what_its_allocator_does(variables: str, units: tuple[Unit, ...]):
    if variables == "keep_ratio" and units is ALTERNATIVES:
        pytest.skip("kept fractions can't choose between alternatives")
    space = SearchSpace(units, 0.3, variables=variables, curves=curves_of(units))
    result = {baseline.label: baseline for baseline in space.baselines()}
    assert tuple(result) == BASELINES
    for name, baseline in result.items():
        rest = units if name == "lagrangian" else tuple(unit for unit in units if len(unit.members) == 1)
        expected = allocate(name, rest, 0.3, curves=space.curves)
        measured = space.allocation(baseline.point) if baseline.ranks is None else allocation_from_ranks(name, units, baseline.ranks)
        assert (measured.ranks, measured.parameters) == (expected.ranks, expected.parameters)


def test_without_errors_there_is_no_marginal_baseline():
    assert [baseline.label for baseline in SearchSpace(LLAMA, 0.3).baselines()] == list(RULES)


def test_as_published_there_are_no_baselines():
    space = SearchSpace(LLAMA, 0.3, VALUES, projected=False, curves=curves_of(LLAMA))
    assert space.baselines() == ()
    assert len(space.first_points(SearchConfig(projected=False, startup_trials=3))) == 3


# --- errors ----------------------------------------------------------------------------------------------------------


def test_nothing_to_search_over_is_told():
    values = tuple(unit for unit in LLAMA if unit.kind == "v_proj")
    with pytest.raises(ConfigError, match="every matrix is kept dense"):
        SearchSpace(values, 0.3, VALUES).distributions()


def test_a_ratio_out_of_reach_is_told():
    space = SearchSpace(LLAMA, 0.99, VALUES)
    with pytest.raises(BudgetError, match="can't be met"):
        space.allocation(space.point_of("uniform", 0.99))

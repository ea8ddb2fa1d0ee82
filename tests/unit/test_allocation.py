"""Allocators spend a budget: never more than it, and all of it but for less than a step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from priced import brute_force, cheapest_step, choices, decaying, error_of, falling, hull_steps, kept_dense, measured_of, models, single

from lowrank_core.allocation import (
    ALLOCATORS,
    RULES,
    AllocationProblem,
    ErrorCurves,
    RankAllocation,
    allocate,
    allocation_from_ranks,
    allocator_named,
    kept_fractions,
    module_group,
    project,
    round_ranks_down,
)
from lowrank_core.errors import BudgetError, ConfigError, RankError
from lowrank_core.parameters import STORAGES, HeadUnit, MatrixShape, Unit, allocated_parameters, budget_for_ratio, dense_parameters

# --- by multipliers: uniform, lord_manual, and the points of a search ------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(models(), st.floats(0.01, 0.95), st.data())
def test_a_projection_meets_the_budget_exactly(units: tuple[Unit, ...], ratio: float, data: st.DataObject):
    """Never over it, under it by less than the cheapest step that is left, and what is locked stays dense."""
    members = [member.name for unit in units for member in unit.members]
    keep = {name for name in members if data.draw(st.booleans())}
    targets = {unit.name: data.draw(st.floats(0.2, 1.0)) for unit in units}
    problem = AllocationProblem(units, ratio, frozenset(keep))
    budget = budget_for_ratio(units, ratio)
    minimum = sum(unit.dense_parameters if kept_dense(unit, keep) else unit.parameters(1) for unit in units)
    if minimum > budget:
        with pytest.raises(BudgetError, match="can't be met"):
            project(problem, targets)
        return
    ranks = project(problem, targets)
    spent = allocated_parameters(units, ranks)
    assert spent <= budget
    assert all(ranks[unit.name] is None for unit in units if kept_dense(unit, keep))
    assert all(rank is None or 1 <= rank <= unit.break_even_rank for unit in units for rank in [ranks[unit.name]])
    step = cheapest_step(units, ranks)
    assert step is None or spent + step > budget


@settings(max_examples=150, deadline=None)
@given(models(), st.floats(0.01, 0.9), st.sampled_from(["uniform", "lord_manual"]))
def test_a_rule_meets_the_budget_exactly(units: tuple[Unit, ...], ratio: float, name: str):
    try:
        result = allocate(name, units, ratio)
    except BudgetError:
        assert sum(unit.parameters(1) if unit.break_even_rank else unit.dense_parameters for unit in units) > budget_for_ratio(units, ratio)
        return
    assert result.allocator == name
    assert result.parameters == allocated_parameters(units, result.ranks) <= budget_for_ratio(units, ratio)
    assert result.compression_ratio >= ratio - 1e-6
    step = cheapest_step(units, dict(result.ranks))
    assert step is None or result.parameters + step > budget_for_ratio(units, ratio)


@settings(max_examples=100, deadline=None)
@given(models(), st.floats(0.05, 0.8), st.floats(0.1, 7.0))
def test_only_ratios_between_multipliers_matter(units: tuple[Unit, ...], ratio: float, factor: float):
    targets = {unit.name: 0.2 + 0.1 * (index % 5) for index, unit in enumerate(units)}
    problem = AllocationProblem(units, ratio)
    try:
        first = allocated_parameters(units, project(problem, targets))
    except BudgetError:
        return
    second = allocated_parameters(units, project(problem, {name: factor * target for name, target in targets.items()}))
    # rounding of the scale may move a single rank, never the total by more than a step
    assert abs(first - second) <= max(unit.parameters(1) for unit in units if unit.break_even_rank)


@settings(max_examples=100, deadline=None)
@given(models(), st.floats(0.05, 0.8))
def test_a_larger_wish_never_gets_less(units: tuple[Unit, ...], ratio: float):
    """In proportion: the kept fractions before rounding are ordered as the multipliers are."""
    targets = {unit.name: 0.2 + 0.1 * (index % 5) for index, unit in enumerate(units)}
    problem = AllocationProblem(units, ratio)
    kept = kept_fractions(problem, targets)
    free = sorted((unit.name for unit in problem.free), key=lambda name: targets[name])
    assert all(kept[low] <= kept[high] * (1 + 1e-12) for low, high in itertools.pairwise(free))
    below = [name for name in free if kept[name] < 1]
    if below:
        np.testing.assert_allclose([kept[name] / targets[name] for name in below], kept[below[0]] / targets[below[0]], rtol=1e-9)
        total = sum(kept[unit.name] * unit.dense_parameters for unit in units)
        assert total == pytest.approx(budget_for_ratio(units, ratio), rel=1e-9)


def test_uniform_gives_equal_shapes_equal_ranks():
    units = [single(f"{i}", 64, 96, kind="up_proj") for i in range(5)]
    values = sorted(rank for rank in allocate("uniform", units, 0.4).ranks.values() if rank is not None)
    assert len(values) == 5
    assert values[-1] - values[0] <= 1


def test_pivoted_storage_affords_more_rank():
    factored, pivoted = (allocate("uniform", [single("a", 64, 96, storage=form)], 0.3).ranks["a"] for form in ("factored", "pivoted"))
    assert factored is not None
    assert pivoted is not None
    assert pivoted > 1.25 * factored


def test_lord_manual_keeps_less_of_q_and_k():
    units = [single(kind, 128, 128) for kind in ("q_proj", "k_proj", "o_proj", "up_proj")]
    ranks = allocate("lord_manual", units, 0.5).ranks
    assert ranks["q_proj"] == ranks["k_proj"] < ranks["o_proj"] == ranks["up_proj"]
    assert ranks["q_proj"] / ranks["o_proj"] == pytest.approx(0.7 / 0.8, abs=0.03)


def test_a_wish_above_its_share_ends_dense():
    ranks = project(AllocationProblem((single("a"), single("b")), 0.2), {"a": 1.0, "b": 0.2})
    assert ranks["a"] is None
    assert ranks["b"] is not None


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if name != "lagrangian"])
def test_rules_can_not_choose_between_alternatives(name: str):
    q, k = single("q"), single("k")
    units = (q, k, Unit((q.members[0], k.members[0])))
    curves = {unit.name: decaying(unit, 0.9) for unit in units}
    with pytest.raises(ConfigError, match=r"stands alone and in a stack.*Allocate by `lagrangian`"):
        allocate(name, units, 0.3, curves=curves, influence=[0.1], **measured_of(units))


def test_a_ratio_out_of_reach_says_what_is_possible():
    units = [single("v", kind="v_proj"), single("q", kind="q_proj")]
    curves = {"v": np.linspace(1, 0, 65), "q": np.linspace(1, 0, 65)}
    for name in ALLOCATORS:
        with pytest.raises(BudgetError, match=r"0\.7 can't be met.*remove only 0\.48.*Lower the ratio"):
            allocate(name, units, 0.7, keep_dense=["v"], curves=curves, influence=[0.1], **measured_of(units))


def test_where_everything_is_kept_only_a_ratio_of_zero_can_be_met():
    units = [single("v", kind="v_proj")]
    for name in ALLOCATORS:
        with pytest.raises(BudgetError, match=r"remove only 0\.000"):
            allocate(
                name,
                units,
                0.1,
                keep_dense=["v"],
                curves={"v": np.linspace(1, 0, 65)},
                influence=[0.1],
                **measured_of(units),
            )
        assert allocate(
            name, units, 0.0, keep_dense=["v"], curves={"v": np.linspace(1, 0, 65)}, influence=[0.1], **measured_of(units)
        ).ranks == {"v": None}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_ratio_of_zero_keeps_everything_dense(name: str):
    units = [single("a"), single("b", 30, 90)]
    curves = {"a": np.linspace(1, 0, 65), "b": np.geomspace(1, 1e-3, 31)}
    assert allocate(name, units, 0.0, curves=curves, influence=[0.1], **measured_of(units)).ranks == {"a": None, "b": None}


# --- lagrangian --------------------------------------------------------------------------------------------------------


def lagrangian(units: Sequence[Unit], curves: ErrorCurves, budget: float) -> RankAllocation:
    dense = dense_parameters(units)
    return allocate("lagrangian", units, max(0.0, 1 - budget / dense), curves=curves)


@settings(max_examples=200, deadline=None)
@given(models(), st.floats(0.01, 0.9), st.integers(0, 1000), st.data())
def test_marginal_meets_the_budget_and_leaves_no_step_that_fits(units: tuple[Unit, ...], ratio: float, seed: int, data: st.DataObject):
    keep = {member.name for unit in units for member in unit.members if data.draw(st.integers(0, 3)) == 0}
    curves = {unit.name: falling(unit, seed + index, 10.0 ** (index % 4)) for index, unit in enumerate(units)}
    budget = budget_for_ratio(units, ratio)
    minimum = sum(unit.dense_parameters if kept_dense(unit, keep) else unit.parameters(1) for unit in units)
    if minimum > budget:
        with pytest.raises(BudgetError, match="can't be met"):
            allocate("lagrangian", units, ratio, keep_dense=keep, curves=curves)
        return
    result = allocate("lagrangian", units, ratio, keep_dense=keep, curves=curves)
    assert result.parameters == allocated_parameters(units, result.ranks) <= budget
    assert all(result.ranks.get(unit.name) is None for unit in units if kept_dense(unit, keep))
    step = cheapest_step(units, dict(result.ranks))
    assert step is None or result.parameters + step > budget


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 0.45), st.floats(0.01, 100)), min_size=2, max_size=3), st.integers(60, 300))
def test_marginal_is_optimal_where_curves_are_convex_and_steps_equal(shapes: list[tuple[float, float]], budget: int):
    """Matrices of 10 x 10: each rank costs 20, and so does the step from the last rank to dense."""
    units = [single(f"{index}", 10, 10) for index in range(len(shapes))]
    curves = {unit.name: decaying(unit, rate, scale) for unit, (rate, scale) in zip(units, shapes, strict=True)}
    assume(20 * len(units) <= budget <= 100 * len(units))
    result = lagrangian(units, curves, budget)
    assert error_of(units, curves, dict(result.ranks)) == pytest.approx(brute_force(units, curves, budget), rel=1e-9, abs=1e-15)


@settings(max_examples=150, deadline=None)
@given(models(maximum=3, least_size=2, size=14), st.floats(0.05, 0.8), st.integers(0, 1000))
def test_marginal_is_within_one_step_of_the_best_there_is(units: tuple[Unit, ...], ratio: float, seed: int):
    """No choice whatever does better with a budget that is smaller by the longest step between hull points."""
    curves = {unit.name: falling(unit, seed + index, 10.0 ** (index % 3)) for index, unit in enumerate(units)}
    free = [unit for unit in units if unit.break_even_rank]
    budget = budget_for_ratio(units, ratio) - dense_parameters(units) + dense_parameters(free)
    assume(free and sum(unit.parameters(1) for unit in free) <= budget)
    result = allocate("lagrangian", units, ratio, curves=curves)
    ours = error_of(free, curves, dict(result.ranks))
    longest = max(step for unit in free for step in hull_steps(unit, curves[unit.name]))
    assert ours <= brute_force(free, curves, budget - longest) * (1 + 1e-9) + 1e-12
    assert ours >= brute_force(free, curves, budget) * (1 - 1e-9) - 1e-12


@settings(max_examples=60, deadline=None)
@given(models(maximum=4, size=40), st.integers(0, 1000))
def test_marginal_never_loses_by_a_larger_budget_between_hull_points(units: tuple[Unit, ...], seed: int):
    """Between two prices, not between any two budgets: what fills the gap to the next hull point is chosen greedily."""
    units = tuple(unit for unit in units if unit.break_even_rank)
    assume(units)
    curves = {unit.name: falling(unit, seed + index) for index, unit in enumerate(units)}
    largest = max(float(curve[0]) for curve in curves.values())
    hull = []
    for price in np.geomspace(largest * 10, largest * 1e-8, 25):
        picked = [min(choices(unit, curves[unit.name]), key=lambda choice, p=price: choice[1] + p * choice[0]) for unit in units]
        hull.append((sum(cost for cost, _ in picked), sum(error for _, error in picked)))
    errors = []
    for budget, minimum in hull:
        result = lagrangian(units, curves, budget)
        errors.append(error_of(units, curves, dict(result.ranks)))
        assert errors[-1] <= minimum * (1 + 1e-9) + 1e-12
    assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in itertools.pairwise(errors))


def test_marginal_follows_the_scales_of_the_errors_where_uniform_can_not():
    units = [single("loud"), single("quiet")]
    curves = {"loud": decaying(units[0], 0.9, 1000.0), "quiet": decaying(units[1], 0.9, 1.0)}
    result, plain = allocate("lagrangian", units, 0.5, curves=curves).ranks, allocate("uniform", units, 0.5).ranks
    assert plain["loud"] == plain["quiet"]
    assert result["loud"] is None or result["loud"] > 2 * result["quiet"]  # type: ignore[operator]
    same = allocate("lagrangian", units, 0.5, curves={name: 7.0 * curve for name, curve in curves.items()}).ranks
    assert same == result  # one unit for all errors, whichever


def test_marginal_follows_the_shapes_of_the_errors():
    """A curve that falls at once needs no rank; a flat one needs all it can get."""
    units = [single("steep"), single("flat")]
    curves = {"steep": decaying(units[0], 0.3), "flat": np.linspace(1, 0, 65)}
    ranks = allocate("lagrangian", units, 0.4, curves=curves).ranks
    assert ranks["steep"] is not None
    assert ranks["steep"] < 20
    assert ranks["flat"] is None or ranks["flat"] > ranks["steep"]


def test_equal_slopes_at_the_optimum():
    """Reverse water-filling: what the next step of any unit would save is nowhere much more than what the last step of another did."""
    units = [single(f"{index}", 60, 40) for index in range(4)]
    curves = {unit.name: decaying(unit, 0.5 + 0.08 * index, 3.0**index) for index, unit in enumerate(units)}
    ranks = allocate("lagrangian", units, 0.6, curves=curves).ranks
    assert all(rank is not None and rank > 1 for rank in ranks.values())
    saved = [curves[name][rank - 1] - curves[name][rank] for name, rank in ranks.items()]
    offered = [curves[name][rank] - curves[name][rank + 1] for name, rank in ranks.items()]
    assert max(offered) <= min(saved) * 1.01


def test_marginal_takes_dense_where_it_is_the_better_buy():
    """Break-even of a square factored matrix is half its rank: past it, dense costs hardly more and loses nothing."""
    units = [single("needed"), single("spare")]
    curves = {"needed": 100 * np.linspace(1, 0, 65), "spare": decaying(units[1], 0.5)}
    result = allocate("lagrangian", units, 0.3, curves=curves)
    assert result.ranks["needed"] is None
    assert result.ranks["spare"] is not None


@pytest.mark.parametrize("together", [True, False])
def test_of_alternatives_marginal_takes_the_better_cover(together: bool):
    """Rows that lie in one space are cheaper as a stack; rows that don't, alone."""
    q, k, o = single("q", 40, 60), single("k", 40, 60), single("o", 50, 50)
    stack = Unit((q.members[0], k.members[0]))
    alone = decaying(q, 0.8)
    curves = {"q": alone, "k": alone, "o": decaying(o, 0.8)}
    curves[stack.name] = np.append(2 * alone[:-1], np.zeros(stack.max_rank - q.max_rank + 1)) if together else decaying(stack, 0.95, 2.0)
    result = allocate("lagrangian", [q, k, stack, o], 0.5, curves=curves)
    assert {name for name, rank in result.ranks.items() if rank is not None} == ({"q+k", "o"} if together else {"q", "k", "o"})
    assert result.parameters <= budget_for_ratio([q, k, o], 0.5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.8), st.sampled_from(sorted(STORAGES)))
def test_alternatives_cover_each_matrix_exactly_once_and_no_other_cover_is_better(seed: int, ratio: float, storage: str):
    """q, k, v alone or stacked, v and o alone or by heads; better by more than two steps between hull points, that is."""
    sizes = {"q": 24, "k": 12, "v": 12, "o": 30}
    shapes = {name: MatrixShape(name, f"{name}_proj", 0, rows, 24 if name == "o" else 30) for name, rows in sizes.items()}
    units: list[Unit] = [Unit((shape,), storage) for shape in shapes.values()]
    units.append(Unit((shapes["q"], shapes["k"], shapes["v"]), storage))
    units.append(HeadUnit((shapes["v"], shapes["o"]), storage, heads=4, groups=2, head_dim=6))
    curves = {unit.name: falling(unit, seed + index, 1.0 + index % 3) for index, unit in enumerate(units)}
    result = allocate("lagrangian", units, ratio, curves=curves)
    members = [member for name in result.ranks for member in name.split("+")]
    assert sorted(members) == sorted(sizes)
    assert result.parameters <= budget_for_ratio(units, ratio)
    covers = [["q", "k", "v", "o"], ["q+k+v", "o"], ["q", "k", "v+o"]]
    named = {unit.name: unit for unit in units}
    for cover in covers:
        own = [named[name] for name in cover]
        step = max(step for unit in own for step in hull_steps(unit, curves[unit.name]))
        less = error_within(own, curves, budget_for_ratio(units, ratio) - 2 * step)
        assert error_of(units, curves, dict(result.ranks)) <= less * (1 + 1e-9) + 1e-12


def error_within(units: Sequence[Unit], curves: ErrorCurves, budget: float) -> float:
    """Return what one cover alone leaves; infinite where it does not fit."""
    try:
        return error_of(units, curves, dict(lagrangian(units, curves, budget).ranks))
    except BudgetError:
        return float("inf")


def test_a_stack_with_a_locked_member_is_not_offered():
    q, v = single("q"), single("v")
    stack = Unit((q.members[0], v.members[0]))
    curves = {"q": decaying(q, 0.9), "v": decaying(v, 0.9), stack.name: 1e-9 * decaying(stack, 0.5)}
    result = allocate("lagrangian", [q, v, stack], 0.3, keep_dense=["v"], curves=curves)
    assert result.ranks["v"] is None
    assert result.ranks["q"] is not None
    assert result.ranks.get(stack.name) is None


def test_marginal_works_where_nothing_is_lost():
    """Zero weights: all errors are zero, and any rank will do."""
    units = [single("a"), single("b")]
    result = allocate("lagrangian", units, 0.5, curves={unit.name: np.zeros(65) for unit in units})
    assert result.parameters <= budget_for_ratio(units, 0.5)


@pytest.mark.parametrize("name", [name for name, method in ALLOCATORS.items() if method.needs_curves])
def test_rules_without_the_errors_that_they_need_are_refused(name: str):
    with pytest.raises(ConfigError, match=f"{name} works from the errors of the units; factorise first"):
        allocate(name, [single("a")], 0.3)


# --- allocators, rounding and files ----------------------------------------------------------------------------------


def test_every_allocator_says_where_it_comes_from():
    for name, method in ALLOCATORS.items():
        assert name == method.name
        assert method.label
        assert method.reference
    assert {name for name, method in ALLOCATORS.items() if method.needs_curves} == {
        "energy",
        "threshold",
        "svd_llm_v2",
        "lagrangian",
        "lems",
    }
    assert {name for name, method in ALLOCATORS.items() if method.needs_influence} == {"block_influence"}
    assert {name for name, method in ALLOCATORS.items() if method.needs_perplexities} == {"truncation_search"}
    assert {name for name, method in ALLOCATORS.items() if method.needs_weights} == {"lems"}
    assert set(ALLOCATORS) - set(RULES) == {"truncation_search", "lems"}
    assert {name for name, method in ALLOCATORS.items() if method.trades_errors} == {"lagrangian"}
    assert {name for name, method in ALLOCATORS.items() if method.takes_alternatives} == {"lagrangian"}
    assert {name for name, method in ALLOCATORS.items() if method.neutral} == {"uniform", "lagrangian"}


def test_unknown_allocators_list_the_known_ones():
    with pytest.raises(
        ConfigError, match="uniform, lord_manual, energy, threshold, svd_llm_v2, block_influence, truncation_search, lagrangian, lems"
    ):
        allocate("best", [single("a")], 0.1)
    with pytest.raises(ConfigError, match="got 'best'"):
        allocator_named("best")


@settings(max_examples=100, deadline=None)
@given(models(size=120), st.floats(0.05, 0.8), st.integers(2, 16))
def test_rounding_down_never_adds_a_parameter(units: tuple[Unit, ...], ratio: float, multiple: int):
    try:
        result = allocate("uniform", units, ratio)
    except BudgetError:
        return
    rounded = round_ranks_down(result, units, multiple)
    assert rounded.parameters <= result.parameters
    for name, rank in result.ranks.items():
        after = rounded.ranks[name]
        if rank is None or rank < multiple:
            assert after == rank
        else:
            assert after is not None
            assert after % multiple == 0
            assert rank - multiple < after <= rank
    assert round_ranks_down(result, units, 1) == result


def test_q_and_k_share_a_group_and_unknown_types_are_their_own():
    assert module_group("q_proj") == module_group("k_proj") == "qk"
    assert module_group("c_attn") == "c_attn"
    assert module_group("q_proj+k_proj+v_proj") == "qk+v"


def test_given_ranks_are_checked():
    units = [single("a", 64, 32), single("b"), Unit((single("a", 64, 32).members[0], single("c", 64, 32).members[0]))]
    with pytest.raises(RankError, match=r"a: rank must be in \[1, 32\], got 33"):
        allocation_from_ranks("manual", units, {"a": 33})
    with pytest.raises(ConfigError, match="'z' is no compressible layer"):
        allocation_from_ranks("manual", units, {"z": 3})
    with pytest.raises(ConfigError, match="a is compressed twice"):
        allocation_from_ranks("manual", units, {"a": 3, "a+c": 3})


def test_what_is_not_named_stays_dense():
    units = [single("a"), single("b")]
    result = allocation_from_ranks("manual", units, {"b": 3})
    assert result.ranks == {"a": None, "b": 3}
    assert result.parameters == 64 * 64 + 3 * 128


@pytest.mark.parametrize(("storage", "last"), [("factored", 31), ("pivoted", 56)])
def test_a_rank_that_would_cost_more_than_the_matrix_is_stored_dense(storage: str, last: int):
    units = [single("a", storage=storage)]
    assert units[0].break_even_rank == last
    assert allocation_from_ranks("manual", units, {"a": last + 1}).ranks["a"] is None
    assert allocation_from_ranks("manual", units, {"a": last}).ranks["a"] == last

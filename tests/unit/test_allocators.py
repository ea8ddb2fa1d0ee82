"""Every allocator of the registry under locks, and what each of the rules promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from priced import (
    brute_force,
    cheapest_step,
    decaying,
    error_of,
    falling,
    hull_steps,
    kept_dense,
    measured_of,
    models,
    single,
)

from lowrank_core.allocation import (
    ALLOCATORS,
    AllocationProblem,
    ErrorCurves,
    RankAllocation,
    allocate,
    kept_fractions,
    project,
    round_ranks_down,
)
from lowrank_core.allocation.block_influence import BlockInfluence
from lowrank_core.allocation.units import check_reachable
from lowrank_core.config import CompressionConfig
from lowrank_core.errors import BudgetError, ConfigError, RankError
from lowrank_core.parameters import HeadUnit, MatrixShape, Unit, budget_for_ratio, dense_parameters

NAMES = st.sampled_from(sorted(ALLOCATORS))
INFLUENCE = (0.3, 0.05, 0.1, 0.4, 0.02, 0.2, 0.15, 0.3)


def curves_of(units: Sequence[Unit], seed: int) -> dict[str, np.ndarray]:
    return {unit.name: falling(unit, seed + index, 10.0 ** (index % 4)) for index, unit in enumerate(units)}


def some_locks(data: st.DataObject, units: Sequence[Unit]) -> dict[str, int | None]:
    """Draw ranks, above break-even too, for some of the units."""
    chosen = [unit for unit in units if data.draw(st.integers(0, 2)) == 0]
    return {unit.name: data.draw(st.none() | st.integers(1, unit.max_rank)) for unit in chosen}


def stored(unit: Unit, rank: int | None) -> int | None:
    """Return ``rank``, or None where it would cost as much as dense."""
    return rank if unit.parameters(rank) < unit.dense_parameters else None


# --- the budget, with and without locks ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(models())
def test_prices_are_what_each_rank_costs(units: tuple[Unit, ...]):
    for unit in units:
        assert unit.prices.tolist() == [unit.parameters(rank) for rank in range(1, unit.break_even_rank + 1)]


@settings(max_examples=500, deadline=None)
@given(NAMES, models(), st.floats(0.0, 0.95), st.integers(0, 1000), st.data())
def test_every_allocator_spends_the_budget_exactly_and_leaves_locks_alone(
    name: str, units: tuple[Unit, ...], ratio: float, seed: int, data: st.DataObject
):
    """Never over it, under it by less than the cheapest step of a unit that is free."""
    keep = {member.name for unit in units for member in unit.members if data.draw(st.integers(0, 4)) == 0}
    fixed, curves, budget = some_locks(data, units), curves_of(units, seed), budget_for_ratio(units, ratio)
    free = [unit for unit in units if unit.name not in fixed and not kept_dense(unit, keep)]
    minimum = sum(unit.parameters(1) for unit in free)
    minimum += sum(unit.parameters(stored(unit, fixed.get(unit.name))) for unit in units if unit not in free)
    if minimum > budget:
        with pytest.raises(BudgetError, match="can't be met"):
            allocate(name, units, ratio, keep_dense=keep, curves=curves, fixed=fixed, influence=INFLUENCE, **measured_of(units))
        return
    if name == "block_influence" and not free:
        return
    result = allocate(name, units, ratio, keep_dense=keep, curves=curves, fixed=fixed, influence=INFLUENCE, **measured_of(units))
    assert result.parameters <= budget
    assert set(result.locked) == set(fixed)
    for unit in units:
        if unit.name in fixed:
            assert result.ranks[unit.name] == stored(unit, fixed[unit.name])
        elif unit not in free:
            assert result.ranks.get(unit.name) is None
    step = cheapest_step(free, dict(result.ranks))
    assert step is None or result.parameters + step > budget


@settings(max_examples=150, deadline=None)
@given(NAMES, NAMES, models(), st.floats(0.05, 0.9), st.integers(0, 1000))
def test_locking_all_that_an_allocator_chose_gives_it_back(first: str, second: str, units: tuple[Unit, ...], ratio: float, seed: int):
    curves = curves_of(units, seed)
    try:
        result = allocate(first, units, ratio, curves=curves, influence=INFLUENCE, **measured_of(units))
    except BudgetError:
        return
    again = allocate(second, units, ratio, curves=curves, fixed=result.ranks, influence=INFLUENCE, **measured_of(units))
    assert again.ranks == result.ranks
    assert again.parameters == result.parameters


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["energy", "threshold"]), models(), st.floats(0.05, 0.9), st.integers(0, 1000), st.data())
def test_locking_some_of_what_one_threshold_chose_changes_nothing(
    name: str, units: tuple[Unit, ...], ratio: float, seed: int, data: st.DataObject
):
    curves = curves_of(units, seed)
    try:
        result = allocate(name, units, ratio, curves=curves)
    except BudgetError:
        return
    fixed = {unit: rank for unit, rank in result.ranks.items() if data.draw(st.booleans())}
    assert allocate(name, units, ratio, curves=curves, fixed=fixed).ranks == result.ranks


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_lock_shifts_what_the_others_get(name: str):
    """The more is locked into one unit, the less is left for the rest."""
    units = [single(kind, 60, 90) for kind in "abcd"]
    curves = {unit.name: decaying(unit, 0.9) for unit in units}
    ranks = []
    for rank in (5, 15, 25):
        result = allocate(name, units, 0.5, curves=curves, fixed={"a": rank}, influence=[0.1], **measured_of(units)).ranks
        assert result["a"] == rank
        ranks.append(sum(result[other] or 36 for other in "bcd"))
    assert ranks[0] > ranks[1] > ranks[2]


def test_a_lock_beats_what_is_kept_dense():
    units = [single("v"), single("q")]
    result = allocate("uniform", units, 0.5, keep_dense=["v"], fixed={"v": 8})
    assert result.ranks["v"] == 8
    assert result.ranks["q"] is not None


def test_what_is_kept_of_a_lock_is_what_it_costs():
    units = (single("a"), single("b"), single("c"))
    kept = kept_fractions(AllocationProblem(units, 0.5, frozenset({"c"}), fixed={"a": 8}), {"b": 1.0})
    assert kept["a"] == 8 * 128 / 64**2
    assert kept["c"] == 1
    assert sum(kept.values()) == pytest.approx(1.5)


def test_rounding_down_leaves_locks_alone():
    units = [single("a", 64, 64), single("b", 64, 64)]
    result = allocate("uniform", units, 0.5, fixed={"a": 13})
    rounded = round_ranks_down(result, units, 8)
    assert rounded.ranks["a"] == 13
    assert rounded.ranks["b"] == 16
    assert rounded.locked == ("a",)


# --- locks and alternatives ------------------------------------------------------------------------------------------


def with_alternatives() -> tuple[Unit, ...]:
    q, k, v = (single(name) for name in "qkv")
    o = single("o")
    heads = HeadUnit((v.members[0], o.members[0]), heads=8, groups=8, head_dim=8)
    return q, k, v, o, Unit((q.members[0], k.members[0])), heads


@pytest.mark.parametrize("rank", [4, None])
def test_a_locked_unit_excludes_what_shares_a_matrix_with_it(rank: int | None):
    units = with_alternatives()
    curves = {unit.name: decaying(unit, 0.9) for unit in units}
    for locked, gone in (("q+k", {"q", "k"}), ("q", {"q+k"}), ("v+o", {"v", "o"}), ("o", {"v+o"})):
        problem = AllocationProblem(units, 0.4, fixed={locked: rank})
        assert {unit.name for unit in units} - {unit.name for unit in problem.free} == {locked} | gone
        result = allocate("lagrangian", units, 0.4, curves=curves, fixed={locked: rank})
        assert result.ranks[locked] == rank
        assert not gone & {name for name, rank in result.ranks.items() if rank is not None}
        assert result.parameters <= budget_for_ratio(units, 0.4)


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("locks", [{"q+k": 10, "v+o": 4}, {"q+k": 10, "v": None}, {"q": 7, "o": 9}, {"k": None, "v+o": None}])
def test_locks_may_settle_every_alternative(name: str, locks: dict[str, int | None]):
    """Then every rule works, for it has nothing left to choose between."""
    units = with_alternatives()
    curves = {unit.name: decaying(unit, 0.9) for unit in units}
    result = allocate(name, units, 0.2, curves=curves, fixed=locks, influence=[0.1], **measured_of(units))
    assert {name: result.ranks[name] for name in locks} == locks
    members = [member for name in result.ranks for member in name.split("+")]
    assert sorted(members) == ["k", "o", "q", "v"]
    assert result.parameters <= budget_for_ratio(units, 0.2)


def test_locks_that_leave_alternatives_leave_the_choice_to_marginal():
    units = with_alternatives()
    with pytest.raises(ConfigError, match="v stands alone and in a stack"):
        allocate("uniform", units, 0.4, fixed={"q": 7})


def test_a_projection_keeps_locks_and_names_each_matrix_once():
    units = with_alternatives()
    ranks = project(AllocationProblem(units, 0.4, fixed={"q+k": 10, "v": 3}), {"o": 1.0})
    assert ranks["q+k"] == 10
    assert ranks["v"] == 3
    assert set(ranks) == {"q+k", "v", "o"}


# --- what is wrong with a lock or a weight ---------------------------------------------------------------------------


def test_bad_locks_are_told():
    units = with_alternatives()
    with pytest.raises(ConfigError, match=r"locked ranks: 'z' is no compressible layer of this model; its layers are named like 'q'"):
        allocate("uniform", units, 0.4, fixed={"z": 3})
    with pytest.raises(RankError, match=r"q: rank must be in \[1, 64\], got 65"):
        allocate("uniform", units, 0.4, fixed={"q": 65})
    with pytest.raises(RankError, match="got 0"):
        allocate("uniform", units, 0.4, fixed={"q": 0})
    with pytest.raises(ConfigError, match=r"q is locked twice, alone and in a stack\. Unlock one of the two"):
        allocate("uniform", units, 0.4, fixed={"q": None, "q+k": 3})


@pytest.mark.parametrize("name", ALLOCATORS)
def test_locks_that_leave_too_little_say_which_to_loosen(name: str):
    units = [single(kind, 64, 64) for kind in "abcde"]
    curves = {unit.name: decaying(unit, 0.9) for unit in units}
    fixed = {"a": None, "b": 31, "c": 30, "d": 1}
    maximum = 1 - (4096 + 128 * (31 + 30 + 1 + 1)) / (5 * 4096)
    with pytest.raises(BudgetError) as caught:
        allocate(name, units, 0.7, curves=curves, fixed=fixed, influence=[0.1], **measured_of(units))
    text = str(caught.value)
    assert "compression ratio 0.7 can't be met: the matrices that stay dense and the 4 locked ranks" in text
    assert f"remove only {maximum:.3f}" in text
    assert "Lower the ratio to at most 0.406, or loosen a lock: " in text
    assert text.endswith("a (dense, 4,096 parameters), b (rank 31, 3,968 parameters), c (rank 30, 3,840 parameters).")
    reachable = allocate(name, units, 0.406, curves=curves, fixed=fixed, influence=[0.1], **measured_of(units))
    assert reachable.ranks["e"] == 1


def test_where_no_lock_can_be_loosened_only_the_ratio_can():
    with pytest.raises(BudgetError, match=r"the locked rank, with rank 1 everywhere else, remove only 0\.969\. Lower the ratio to at most"):
        allocate("uniform", [single("a"), single("b")], 0.99, fixed={"a": 1})


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_must_be_positive(weight: float):
    with pytest.raises(ConfigError, match="a must have a positive, finite weight"):
        AllocationProblem((single("a"),), 0.3, weights={"a": weight})


def test_weights_are_those_of_units():
    with pytest.raises(ConfigError, match="weights: 'z' is no compressible layer"):
        AllocationProblem((single("a"),), 0.3, weights={"z": 1.0})


# --- lagrangian with locks and weights ---------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(models(), st.floats(0.05, 0.8), st.integers(0, 1000), st.data())
def test_weights_multiply_the_errors(units: tuple[Unit, ...], ratio: float, seed: int, data: st.DataObject):
    curves = curves_of(units, seed)
    weights = {unit.name: data.draw(st.floats(1e-3, 1e3)) for unit in units if data.draw(st.booleans())}
    multiplied = {name: weights.get(name, 1.0) * curve for name, curve in curves.items()}
    try:
        result = allocate("lagrangian", units, ratio, curves=curves, weights=weights)
    except BudgetError:
        return
    assert result == allocate("lagrangian", units, ratio, curves=multiplied)


@settings(max_examples=150, deadline=None)
@given(models(maximum=4, least_size=2, size=12), st.floats(0.05, 0.8), st.integers(0, 1000), st.data())
def test_marginal_is_within_one_step_of_the_best_under_locks_and_weights(
    units: tuple[Unit, ...], ratio: float, seed: int, data: st.DataObject
):
    curves, fixed = curves_of(units, seed), some_locks(data, units)
    weights = {unit.name: data.draw(st.floats(0.01, 100)) for unit in units}
    weighed = {name: weights[name] * curve for name, curve in curves.items()}
    free = [unit for unit in units if unit.break_even_rank and unit.name not in fixed][:3]
    fixed |= {unit.name: None for unit in units if unit not in free and unit.name not in fixed}
    committed = sum(unit.parameters(stored(unit, fixed[unit.name])) for unit in units if unit not in free)
    budget = budget_for_ratio(units, ratio) - committed
    assume(free and sum(unit.parameters(1) for unit in free) <= budget)
    result = allocate("lagrangian", units, ratio, curves=curves, fixed=fixed, weights=weights)
    ours = error_of(free, weighed, dict(result.ranks))
    longest = max(step for unit in free for step in hull_steps(unit, weighed[unit.name]))
    assert ours <= brute_force(free, weighed, budget - longest) * (1 + 1e-9) + 1e-12
    assert ours >= brute_force(free, weighed, budget) * (1 - 1e-9) - 1e-12


def test_a_heavier_unit_gets_more():
    units = [single("a"), single("b")]
    curves = {unit.name: decaying(unit, 0.9) for unit in units}
    result = allocate("lagrangian", units, 0.6, curves=curves, weights={"a": 100.0}).ranks
    assert result["a"] is None or result["a"] > (result["b"] or 64)


# --- one threshold for all: energy and singular values ---------------------------------------------------------------

SQUARES = [single(f"{index}", 40, 40, kind="up_proj") for index in range(6)]
"""Equal prices: of 80 a rank, and dense (1600) is 80 more than break-even (19)."""


def lost_energy(curve: np.ndarray, rank: int | None) -> float:
    return 0.0 if rank is None else float(curve[rank] / curve[0])


def singular_value(curve: np.ndarray, rank: int) -> float:
    """Return σ_rank/σ_1."""
    return math.sqrt((curve[rank - 1] - curve[rank]) / (curve[0] - curve[1]))


def next_and_last(unit: Unit, rank: int | None) -> tuple[int | None, int | None]:
    """Return from which rank the next step would go, and from which the last one went."""
    last = unit.break_even_rank if rank is None else rank - 1
    return rank, last or None


@settings(max_examples=100, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(0, 10_000))
def test_retained_energies_are_equal_up_to_one_step(ratio: float, seed: int):
    curves = curves_of(SQUARES, seed)
    ranks = allocate("energy", SQUARES, ratio, curves=curves).ranks
    steps = {unit.name: next_and_last(unit, ranks[unit.name]) for unit in SQUARES}
    worst = max(lost_energy(curves[name], now) for name, (now, _) in steps.items())
    assert all(lost_energy(curves[name], last) >= worst - 1e-12 for name, (_, last) in steps.items() if last is not None)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(0, 10_000))
def test_no_singular_value_is_kept_where_a_larger_one_is_not(ratio: float, seed: int):
    curves = curves_of(SQUARES, seed)
    ranks = allocate("threshold", SQUARES, ratio, curves=curves).ranks
    steps = {unit.name: next_and_last(unit, ranks[unit.name]) for unit in SQUARES}
    largest = max((singular_value(curves[name], now + 1) for name, (now, _) in steps.items() if now is not None), default=0.0)
    assert all(singular_value(curves[name], last + 1) >= largest - 1e-12 for name, (_, last) in steps.items() if last is not None)


@pytest.mark.parametrize("name", ["energy", "threshold"])
def test_a_larger_budget_takes_nothing_away_where_steps_cost_the_same(name: str):
    """In general what is left over may go elsewhere."""
    curves = curves_of(SQUARES, 7)
    result = [allocate(name, SQUARES, ratio, curves=curves).ranks for ratio in np.linspace(0.9, 0.0, 40)]
    for smaller, larger in itertools.pairwise(result):
        assert all((smaller[unit] or 99) <= (larger[unit] or 99) for unit in smaller)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["energy", "threshold"]), models(), st.floats(0.05, 0.9), st.integers(0, 1000), st.data())
def test_the_unit_of_each_unit_s_errors_does_not_matter(name: str, units: tuple[Unit, ...], ratio: float, seed: int, data: st.DataObject):
    curves = curves_of(units, seed)
    scaled = {key: curve * 4.0 ** data.draw(st.integers(-20, 20)) for key, curve in curves.items()}  # powers of 4: exact, roots too
    assert same(name, units, ratio, curves, scaled)


def same(name: str, units: tuple[Unit, ...], ratio: float, first: ErrorCurves, second: ErrorCurves) -> bool:
    try:
        result = allocate(name, units, ratio, curves=first, influence=INFLUENCE, **measured_of(units))
    except BudgetError:
        return True
    return result == allocate(name, units, ratio, curves=second, influence=INFLUENCE, **measured_of(units))


def test_energy_goes_to_the_slow_curve_and_ends_dense_above_break_even():
    units = [single("steep"), single("flat")]
    curves = {"steep": decaying(units[0], 0.3), "flat": np.linspace(1, 0, 65)}
    for name in ("energy", "threshold"):
        ranks = allocate(name, units, 0.4, curves=curves).ranks
        assert ranks["flat"] is None
        assert ranks["steep"] is not None
        assert ranks["steep"] == (budget_for_ratio(units, 0.4) - 4096) // 128


def test_a_threshold_is_that_of_the_definition():
    """σ = 1, 0.9, …: as many as lie above, and dense where they are more than break-even."""
    units = [single("slow", 100, 100), single("fast", 100, 100)]
    sigma = {"slow": 0.98 ** np.arange(100), "fast": 0.9 ** np.arange(100)}
    curves = {name: np.append((values**2)[::-1].cumsum()[::-1], 0.0) * 50 for name, values in sigma.items()}
    spent = 200 * (20 + 4)
    ranks = allocate("threshold", units, 1 - spent / 20_000, curves=curves).ranks
    assert ranks == {"slow": 20, "fast": 4}  # 0.98^19 = 0.681, 0.9^3 = 0.729 are kept; 0.98^20 = 0.668, 0.9^4 = 0.656 are not


@pytest.mark.parametrize("name", ["energy", "threshold"])
def test_equal_curves_share_what_there_is_evenly(name: str):
    """Also where nothing tells steps apart: no errors at all, or a plateau."""
    for curve in (np.zeros(41), np.append(np.ones(40), 0.0), decaying(SQUARES[0], 0.9)):
        ranks = allocate(name, SQUARES, 0.5, curves={unit.name: curve for unit in SQUARES}).ranks
        assert max(rank or 99 for rank in ranks.values()) - min(rank or 99 for rank in ranks.values()) <= 1


# --- SVD-LLM V2 ------------------------------------------------------------------------------------------------------


def removed(units: Sequence[Unit], result: RankAllocation) -> Mapping[str, float]:
    return {unit.name: 1 - unit.parameters(result.ranks[unit.name]) / unit.dense_parameters for unit in units}


def test_what_svd_llm_v2_removes_is_inverse_to_the_logarithm_of_the_loss():
    units = [single(f"{index}", 500, 500, kind="up_proj") for index in range(4)]
    losses = np.array([10.0, 20.0, 50.0, 3000.0])  # over the 524,288 tokens of the paper's calibration
    rank = units[0].rank_for_parameters(0.7 * 250_000)
    assert rank is not None
    line = np.linspace(1, 0, 501)
    curves = {unit.name: loss**2 / 524_288 * line / line[rank] for unit, loss in zip(units, losses, strict=True)}
    expected = 1 / np.log(losses)
    result = removed(units, allocate("svd_llm_v2", units, 0.3, curves=curves))
    np.testing.assert_allclose(list(result.values()), 0.3 * expected / expected.mean(), atol=0.005)
    assert np.mean(list(result.values())) == pytest.approx(0.3, abs=0.001)


def test_svd_llm_v2_compares_matrices_of_one_type_only():
    units = [single(f"{kind}{index}", 300, 200, kind=kind) for kind in ("q_proj", "up_proj") for index in range(3)]
    curves = {unit.name: (1.0 + index) * decaying(unit, 0.97) for index, unit in enumerate(units)}
    louder = {name: 9.0 * curve if name.startswith("up") else curve for name, curve in curves.items()}
    result = allocate("svd_llm_v2", units, 0.4, curves=curves)
    quiet = [unit for unit in units if unit.kind == "q_proj"]
    before, after = (removed(quiet, allocate("svd_llm_v2", units, 0.4, curves=each)) for each in (curves, louder))
    np.testing.assert_allclose(list(before.values()), list(after.values()), atol=0.01)  # up to the remainder
    for kind in ("q_proj", "up_proj"):
        mine = [share for name, share in removed(units, result).items() if name.startswith(kind)]
        assert mine == sorted(mine, reverse=True)
        assert np.mean(mine) == pytest.approx(0.4, abs=0.01)


def test_the_unit_of_small_losses_moves_little():
    """The logarithm of a large loss changes slowly: ten times the loss moves no share by more than a tenth of the ratio."""
    units = [single(f"{index}", 300, 200, kind="up_proj") for index in range(4)]
    curves = {unit.name: (1.0 + index) * decaying(unit, 0.99) for index, unit in enumerate(units)}
    one, other = (removed(units, allocate("svd_llm_v2", units, 0.4, curves={n: c * f for n, c in curves.items()})) for f in (1.0, 100.0))
    np.testing.assert_allclose(list(one.values()), list(other.values()), atol=0.04)


def test_svd_llm_v2_with_equal_losses_or_none_is_uniform():
    units = [single(f"{index}", 60, 90, kind="up_proj") for index in range(4)]
    uniform = allocate("uniform", units, 0.4).ranks
    for curve in (decaying(units[0], 0.9), np.zeros(61)):
        assert allocate("svd_llm_v2", units, 0.4, curves={unit.name: curve for unit in units}).ranks == uniform


def test_a_lossless_matrix_among_lossy_ones_is_compressed_most():
    units = [single(f"{index}", 60, 90, kind="up_proj") for index in range(3)]
    curves = {"0": np.zeros(61), "1": decaying(units[1], 0.9), "2": decaying(units[2], 0.9)}
    ranks = allocate("svd_llm_v2", units, 0.3, curves=curves).ranks
    assert ranks["0"] is not None
    assert ranks["0"] < min(ranks["1"] or 99, ranks["2"] or 99)


# --- block influence -------------------------------------------------------------------------------------------------


def in_blocks(blocks: int, size: int = 400) -> list[Unit]:
    shapes = [MatrixShape(f"{block}.{kind}", kind, block, size, size) for block in range(blocks) for kind in ("q_proj", "up_proj")]
    return [Unit((shape,)) for shape in shapes]


def test_a_block_loses_in_proportion_to_the_softmax_of_its_influence():
    units, influence = in_blocks(4), np.array([0.05, 0.02, 0.1, 0.08])
    result = removed(units, allocate("block_influence", units, 0.3, influence=influence.tolist()))
    weights = np.exp(-influence / BlockInfluence().epsilon)
    expected = 0.3 * weights / weights.mean()
    np.testing.assert_allclose([result[f"{block}.up_proj"] for block in range(4)], expected, atol=0.005)
    np.testing.assert_allclose([result[f"{block}.q_proj"] for block in range(4)], expected, atol=0.005)


def test_a_large_epsilon_is_uniform_and_a_small_one_takes_all_from_one_block():
    units, influence = in_blocks(4, 60), [0.05, 0.02, 0.1, 0.08]
    problem = AllocationProblem(tuple(units), 0.2, influence=influence)
    assert problem.completed(BlockInfluence(epsilon=1e9).ranks(problem)) == allocate("uniform", units, 0.2).ranks
    ranks = BlockInfluence(epsilon=1e-4).ranks(problem)
    assert ranks["1.q_proj"] == 6  # keeps 1 - 4 x 0.2, and the other blocks everything
    assert ranks["0.q_proj"] is None


def test_a_stack_across_blocks_takes_the_mean_of_theirs():
    shapes = [MatrixShape(f"{block}", "up_proj", block, 400, 400) for block in range(4)]
    units = [Unit((shapes[0], shapes[3])), Unit((shapes[1],)), Unit((shapes[2],))]
    result = removed(units, allocate("block_influence", units, 0.2, influence=[0.05, 0.02, 0.1, 0.08]))
    weights = np.exp(-np.array([0.05, 0.02, 0.1, 0.08]) / BlockInfluence().epsilon)
    expected = 0.2 * weights / weights.mean()
    assert result["0+3"] == pytest.approx((expected[0] + expected[3]) / 2, abs=0.01)
    assert result["1"] == pytest.approx(expected[1], abs=0.01)


def test_blocks_that_are_fixed_leave_their_part_to_the_others():
    units = in_blocks(3)
    fixed: dict[str, int | None] = {"0.q_proj": None, "0.up_proj": None}
    result = removed(units, allocate("block_influence", units, 0.2, fixed=fixed, influence=[0.3, 0.1, 0.1]))
    others = [share for name, share in result.items() if not name.startswith("0.")]
    np.testing.assert_allclose(others, 0.3, atol=0.005)


@pytest.mark.parametrize("influence", [(), (0.1, 0.2)])
def test_missing_influences_ask_for_a_new_calibration(influence: tuple[float, ...]):
    with pytest.raises(ConfigError, match=rf"needs the influence of 3 blocks, and {len(influence)} are known\. Calibrate again"):
        allocate("block_influence", in_blocks(3), 0.2, influence=influence)


def test_free_units_alone_say_how_much_is_kept_of_them():
    units = in_blocks(3)
    problem = AllocationProblem(tuple(units), 0.2, frozenset({"0.q_proj"}), fixed={"0.up_proj": 50})
    assert problem.available == budget_for_ratio(units, 0.2) - 400**2 - 50 * 800
    assert problem.kept_share == problem.available / (4 * 400**2)
    assert problem.committed + dense_parameters(problem.free) == 5 * 400**2 + 50 * 800
    assert AllocationProblem(tuple(units), 0.2, fixed={"0.up_proj": 1, "0.q_proj": 1, "1.q_proj": 1}).kept_share == 1


def test_whether_a_ratio_can_be_reached_depends_on_the_locks():
    units = with_alternatives()
    config = CompressionConfig(value_dense=False)
    check_reachable(units, 0.7, config)
    check_reachable(units, 0.7, config, fixed={"q+k": 10, "v+o": 2})
    with pytest.raises(BudgetError, match=r"the 2 locked ranks.*loosen a lock: q\+k \(dense, 8,192 parameters\), v \(rank 31, 3,968"):
        check_reachable(units, 0.7, config, fixed={"q+k": None, "v": 31})
    with pytest.raises(ConfigError, match="no compressible layer"):
        check_reachable(units, 0.7, config, fixed={"z": 1})

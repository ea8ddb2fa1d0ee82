"""Drafts of manual ranks: what is locked never moves, a fit meets the budget, every step can be taken back, files come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import cheapest_step, models, single

from lowrank_core.allocation import Draft, DraftHistory, allocate, allocation_from_ranks, began, parse_allocation
from lowrank_core.allocation.curves import CURVES_FILE, CurveRecord, load_curves, save_curves
from lowrank_core.allocation.units import plan_units
from lowrank_core.config import CompressionConfig, RunConfig
from lowrank_core.errors import BudgetError, ConfigError, RankError, RunError
from lowrank_core.parameters import HeadUnit, MatrixShape, Unit, budget_for_ratio
from lowrank_core.runs import Run, create_run, write_json
from lowrank_core.runs.drafts import has_draft, load_draft, new_token, save_draft

Change = Callable[[Draft], Draft]


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """A draft of random ranks, some of them locked."""
    units = draw(models(maximum=4, size=40))
    ranks = {unit.name: draw(st.one_of(st.none(), st.integers(1, unit.max_rank))) for unit in units}
    locked = [unit.name for unit in units if draw(st.integers(0, 3)) == 0]
    return Draft.of(units, ranks, locked=locked, rank_multiple=draw(st.sampled_from([1, 1, 4])))


@st.composite
def moves(draw: st.DrawFn) -> tuple[Draft, Change]:
    """A draft, and a change that tools other than the table make."""
    draft = draw(drafts())
    names = [unit.name for unit in draft.rows if draw(st.booleans())]
    kept, ratio = draw(st.floats(0, 1)), draw(st.floats(0, 0.99))
    if draw(st.booleans()):
        return draft, lambda before: before.scaled(names, kept)

    def fitted(before: Draft) -> Draft:
        try:
            return before.fitted(ratio)
        except BudgetError:
            return before

    return draft, fitted


# laws of a draft


@settings(max_examples=60, deadline=None)
@given(moves())
def test_locked_rows_never_move(move: tuple[Draft, Change]):
    draft, change = move
    after = change(draft)
    assert {name: after.ranks[name] for name in draft.locked} == {name: draft.ranks[name] for name in draft.locked}
    assert after.locked == draft.locked
    assert list(after.ranks) == list(draft.ranks)


def test_the_same_change_moves_what_is_not_locked():
    draft = Draft.of([single("a"), single("b")], {"a": 20, "b": 20}, locked=["a"])
    assert draft.scaled(["a", "b"], 0.25).ranks == {"a": 20, "b": 8}
    assert draft.with_locks(["a"], locked=False).scaled(["a", "b"], 0.25).ranks == {"a": 8, "b": 8}


@settings(max_examples=60, deadline=None)
@given(drafts(), st.floats(0, 0.99))
def test_a_fit_meets_the_budget_exactly_or_says_why_not(draft: Draft, ratio: float):
    """Never over it; under it by less than the cheapest step of a row that may move, where ranks need not be multiples."""
    budget = budget_for_ratio(draft.units, ratio)
    free = draft.movable()
    fixed = draft.parameters - sum(unit.parameters(draft.ranks[unit.name]) for unit in free)
    if fixed + sum(unit.parameters(1) for unit in free) > budget or (not free and fixed != budget):
        with pytest.raises(BudgetError, match="locked" if draft.locked or not free else "can't be met"):
            draft.fitted(ratio)
        return
    result = draft.fitted(ratio)
    assert result.parameters <= budget
    step = cheapest_step(free, result.ranks)
    if draft.rank_multiple == 1 and step is not None:
        assert budget - result.parameters < step


@settings(max_examples=60, deadline=None)
@given(drafts(), st.floats(0, 1))
def test_a_slider_spends_its_share_and_leaves_the_others_alone(draft: Draft, kept: float):
    names = [unit.name for unit in draft.rows[::2]]
    free = draft.movable(names)
    result = draft.scaled(names, kept)
    assert {n: r for n, r in result.ranks.items() if n not in names} == {n: r for n, r in draft.ranks.items() if n not in names}
    spent = sum(unit.parameters(result.ranks[unit.name]) for unit in free)
    minimum = sum(unit.parameters(1) for unit in free)
    assert spent <= max(minimum, kept * sum(unit.dense_parameters for unit in free) + 1e-3)


def test_a_fit_keeps_proportions():
    units = [single(name) for name in "abc"]
    draft = Draft.of(units, {"a": 4, "b": 8, "c": 16}).fitted(0.75)
    ranks = draft.ranks
    assert (ranks["b"], ranks["c"]) == (pytest.approx(2 * ranks["a"], abs=1), pytest.approx(4 * ranks["a"], abs=2))


@settings(max_examples=60, deadline=None)
@given(drafts())
def test_the_count_is_that_of_the_allocation(draft: Draft):
    allocation = draft.allocation("manual")
    assert draft.parameters == allocation.parameters
    assert allocation.ranks == draft.ranks
    assert Draft.of(draft.units, allocation.ranks, locked=allocation.locked, rank_multiple=draft.rank_multiple) == draft


@settings(max_examples=60, deadline=None)
@given(drafts())
def test_what_is_written_is_read_back(draft: Draft):
    read = parse_allocation(draft.to_json("manual"), "mine.json")
    assert Draft.of(draft.units, read.ranks, locked=read.locked, rank_multiple=draft.rank_multiple) == draft


def test_a_rank_that_costs_as_much_as_the_matrix_is_dense():
    unit = single("a")
    draft = Draft.of([unit], {"a": 3})
    assert unit.break_even_rank == 31
    assert draft.with_rank("a", 31).ranks == {"a": 31}
    assert draft.with_rank("a", 32).ranks == {"a": None}
    pivoted = Draft.of([single("a", storage="pivoted")], {"a": 3})
    assert pivoted.with_rank("a", 32).ranks == {"a": 32}
    with pytest.raises(RankError, match=r"rank must be in \[1, 64\], got 65"):
        draft.with_rank("a", 65)
    with pytest.raises(RankError, match="got 0"):
        draft.with_rank("a", 0)


def test_a_kept_ratio_is_the_largest_rank_within_it():
    draft = Draft.of([single("a")], {"a": 3})
    assert draft.with_kept("a", 0.5).ranks == {"a": 16}
    assert draft.with_kept("a", 0.499).ranks == {"a": 15}
    assert draft.with_kept("a", 1).ranks == {"a": None}
    assert draft.with_kept("a", 0).ranks == {"a": 1}
    with pytest.raises(RankError, match="between 0 and 100 %"):
        draft.with_kept("a", 1.2)


def test_a_locked_row_refuses_another_rank():
    draft = Draft.of([single("a")], {"a": 3}, locked=["a"])
    assert draft.with_rank("a", 3) is draft
    with pytest.raises(RankError, match=r"a is locked at rank 3\. Unlock it"):
        draft.with_rank("a", 4)


def test_names_that_are_no_rows_are_refused():
    units = plan_units(_shapes(), CompressionConfig(basis="two_sided", value_dense=False, stacks=True))
    draft = Draft.of(units, {})
    with pytest.raises(ConfigError, match="no compressible layer"):
        draft.with_rank("nowhere", 3)
    with pytest.raises(ConfigError, match="Regroup"):
        draft.with_rank("0.q_proj+0.k_proj+0.v_proj", 3)
    with pytest.raises(ConfigError, match="no compressible layer"):
        Draft.of(units, {"lm_head": 3})


# alternatives


def _shapes() -> list[MatrixShape]:
    sizes = {"q_proj": (24, 24), "k_proj": (12, 24), "v_proj": (12, 24), "o_proj": (24, 24)}
    return [
        MatrixShape(f"{depth}.{kind}", kind, depth, *size, input_group=f"{depth}.{'out' if kind == 'o_proj' else 'in'}")
        for depth in range(2)
        for kind, size in sizes.items()
    ]


def _grouped() -> tuple[Unit, ...]:
    shapes = {shape.name: shape for shape in _shapes()}
    heads = [HeadUnit((shapes[f"{d}.v_proj"], shapes[f"{d}.o_proj"]), heads=2, groups=1, head_dim=12) for d in range(2)]
    config = CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False, stacks=True, heads=True)
    return plan_units(list(shapes.values()), config, heads)


def test_modules_are_regrouped_and_each_is_in_one_row():
    units = _grouped()
    draft = Draft.of(units, {"0.q_proj": 4, "0.k_proj": 4, "0.v_proj": 4})
    stack, heads = "0.q_proj+0.k_proj+0.v_proj", "0.v_proj+0.o_proj"
    assert {unit.name for unit in draft.alternatives("0.v_proj")} == {"0.v_proj", heads, stack}
    stacked = draft.regrouped(stack)
    assert stacked.ranks[stack] is not None
    assert "0.q_proj" not in stacked.ranks
    assert stacked.kept([stack]) == pytest.approx(draft.kept(["0.q_proj", "0.k_proj", "0.v_proj"]), abs=0.1)
    by_heads = stacked.regrouped(heads)
    assert {"0.q_proj", "0.k_proj", heads} <= set(by_heads.ranks)
    for result in (stacked, by_heads):
        members = [member.name for unit in result.rows for member in unit.members]
        assert sorted(members) == sorted(shape.name for shape in _shapes())
        assert result.parameters == result.allocation("manual").parameters
        assert {n: r for n, r in result.ranks.items() if n.startswith("1.")} == {n: r for n, r in draft.ranks.items() if n.startswith("1.")}
    assert by_heads.regrouped(heads) is by_heads
    with pytest.raises(RankError, match=r"taken apart\. Unlock it first"):
        by_heads.with_locks([heads], locked=True).regrouped("0.v_proj")


def test_an_allocator_may_regroup_and_leaves_locks():
    units = _grouped()
    curves = {unit.name: np.linspace(1.0, 0.0, unit.max_rank + 1) for unit in units}
    draft = Draft.of(units, {"0.o_proj": 5}, locked=["0.o_proj"])
    result = draft.completed(allocate("lagrangian", units, 0.3, curves=curves, fixed={"0.o_proj": 5}))
    assert result.ranks["0.o_proj"] == 5
    assert result.locked == {"0.o_proj"}
    assert result.parameters <= budget_for_ratio(units, 0.3)
    with pytest.raises(ConfigError, match=r"would move 0\.o_proj"):
        draft.completed(allocation_from_ranks("uniform", units, {"0.o_proj": 6}))


def test_matrices_that_no_row_can_hold_are_counted_dense():
    first, second, third = (MatrixShape(name, name, 0, 8, 8) for name in "abc")
    units = [Unit((first, second)), Unit((second, third))]
    draft = Draft.of(units, {"a+b": 1})
    assert list(draft.ranks) == ["a+b"]
    assert draft.parameters == draft.allocation("manual").parameters == 24 + 64
    assert draft.fitted(0.5).parameters <= 96


# steps


@settings(max_examples=60, deadline=None)
@given(moves())
def test_undoing_an_edit_is_the_identity(move: tuple[Draft, Change]):
    draft, change = move
    history = began(draft)
    after = history.edited(change)
    assert after.undone().present == draft
    assert after.undone().redone().present == after.present
    assert history.undone() == history
    assert history.redone() == history


def _ranked(rank: int) -> Change:
    return lambda draft: draft.with_rank("a", rank)


def test_several_steps_are_taken_back_and_a_new_one_forgets_what_was():
    history = began(Draft.of([single("a")], {"a": 3}))
    for rank in (4, 5, 6):
        history = history.edited(_ranked(rank))
    back = history.undone().undone()
    assert back.present.ranks == {"a": 4}
    assert back.redone().redone().present.ranks == {"a": 6}
    assert back.edited(_ranked(9)).future == ()
    reset = history.reset()
    assert reset.present == history.start
    assert reset.undone().present.ranks == {"a": 6}
    again = history.started(history.present.with_rank("a", 20))
    assert again.reset() == again
    assert again.undone().present.ranks == {"a": 6}


def test_the_values_of_one_drag_are_one_step_from_where_it_began():
    draft = Draft.of([single("a"), single("b")], {"a": 4, "b": 16})
    history = began(draft)
    for kept in (0.5, 0.01, 0.3):
        history = history.edited(lambda before, kept=kept: before.scaled(["a", "b"], kept), gesture="drag")
    assert history.present == draft.scaled(["a", "b"], 0.3)
    assert history.undone().present == draft
    other = history.edited(lambda before: before.scaled(["a", "b"], 0.2), gesture="another drag")
    assert other.undone().present == history.present


def test_only_so_many_steps_are_kept():
    history = began(Draft.of([single("a")], {"a": 1}))
    for step in range(120):
        history = history.edited(_ranked(1 + (step + 1) % 30))
    assert len(history.past) == 50


# files


@pytest.fixture
def run() -> Run:
    return create_run(RunConfig())


def _history() -> DraftHistory:
    return (
        began(Draft.of([single("a"), single("b")], {"a": 4, "b": 16})).edited(_ranked(9)).edited(lambda d: d.with_locks(["b"], locked=True))
    )


def test_a_draft_survives_on_disk_with_its_beginning(run: Run):
    history, token = _history(), new_token()
    save_draft(run, token, history)
    result = load_draft(run, token, history.present.units)
    assert result is not None
    assert (result.present, result.start, result.past) == (history.present, history.start, ())


def test_two_authors_do_not_meet(run: Run):
    history, mine, yours = _history(), new_token(), new_token()
    save_draft(run, mine, history)
    save_draft(run, yours, history.undone())
    assert mine != yours
    result = load_draft(run, mine, history.present.units)
    assert result is not None
    assert result.present == history.present


@pytest.mark.parametrize("token", ["", "..", "../../run", "0123456789ab", "ABCDEF012345"])
def test_a_token_that_names_no_draft_opens_nothing(run: Run, token: str):
    assert not has_draft(run, token)
    assert load_draft(run, token, [single("a")]) is None


def test_drafts_of_a_recorded_run_are_kept_elsewhere(run: Run):
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    token = new_token()
    save_draft(run, token, _history())
    assert has_draft(run, token)
    assert not (run.path / "drafts").exists()


def test_old_drafts_make_room(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowrank_core.runs.drafts._MAX_FILES", 2)
    tokens = [new_token() for _ in range(4)]
    for token in tokens:
        save_draft(run, token, _history())
    assert sum(has_draft(run, token) for token in tokens) == 2
    assert has_draft(run, tokens[-1])


@pytest.mark.parametrize("body", [{}, {"draft": {"ranks": [1], "locked": []}}, {"draft": {"ranks": {"a": 2.5}, "locked": []}}])
def test_a_damaged_draft_says_what_to_do(run: Run, body: dict[str, object]):
    token = new_token()
    write_json(run.path / "drafts" / f"{token}.json", body)
    with pytest.raises(RunError, match=r"holds no draft\. Delete the file"):
        load_draft(run, token, [single("a")])


# error curves


def _record(units: list[Unit]) -> CurveRecord:
    curves = {unit.name: np.geomspace(2.0, 1e-9, unit.max_rank + 1) for unit in units}
    return CurveRecord("two_sided", "kl", curves, (0.5, 0.1))


def test_curves_are_read_back_exactly_up_to_where_ranks_end(run: Run):
    units = [single("a"), single("b", 8, 30, storage="pivoted")]
    record = _record(units)
    save_curves(run.path / CURVES_FILE, record, units)
    result = load_curves(run.path / CURVES_FILE)
    assert result is not None
    assert (result.basis, result.estimate, result.influence, list(result.curves)) == ("two_sided", "kl", (0.5, 0.1), ["a", "b"])
    for unit in units:
        assert np.array_equal(result.curves[unit.name], record.curves[unit.name][: unit.break_even_rank + 2])


def test_allocators_choose_by_the_file_as_by_the_curves(run: Run):
    units = [single("a"), single("b", 8, 30, storage="pivoted"), single("c", 40, 64)]
    record = _record(units)
    record = replace(record, curves={name: curve * (1 + len(curve)) for name, curve in record.curves.items()})
    save_curves(run.path / CURVES_FILE, record, units)
    result = load_curves(run.path / CURVES_FILE)
    assert result is not None
    for name in ("energy", "lagrangian", "threshold", "svd_llm_v2"):
        assert allocate(name, units, 0.4, curves=result.curves) == allocate(name, units, 0.4, curves=record.curves), name


def test_energy_and_error_of_a_rank():
    record = CurveRecord("two_sided", "kl", {"a": np.array([4.0, 1.0, 0.0]), "dead": np.zeros(3)})
    assert (record.error("a", 1), record.error("a", None), record.error("a", 9), record.error("b", 1)) == (1.0, 0.0, None, None)
    assert (record.energy("a", 1), record.energy("a", None), record.energy("dead", 1), record.energy("b", None)) == (0.75, 1.0, 1.0, None)


def test_a_run_without_curves_has_none_and_damaged_ones_are_told(run: Run):
    path = run.path / CURVES_FILE
    assert load_curves(path) is None
    units = [single("a")]
    for spoiled in (b"no archive", b""):
        path.write_bytes(spoiled)
        with pytest.raises(RunError, match="start the run's worker"):
            load_curves(path)
    save_curves(path, CurveRecord("two_sided", "guess", _record(units).curves), units)
    with pytest.raises(RunError, match="no error curves"):
        load_curves(path)
    save_curves(path, CurveRecord("two_sided", "kl", {"a": np.array([1.0, np.nan])}), units)
    with pytest.raises(RunError, match="not complete"):
        load_curves(path)

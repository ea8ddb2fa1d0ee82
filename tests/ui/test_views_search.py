"""What the Rank search page knows of a search, as numbers: every kind of trial, windows, workers, fronts, plans, allocations manually."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import replace

import pandas as pd
import pytest
from synthetic import (
    BLOCKS,
    FRONT,
    RATIO,
    comparison,
    make_run,
    matrices,
    priced_units,
    running_status,
    write_answers,
    write_front,
    write_rich_study,
)

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.allocation.units import plan_units
from lowrank_core.config import CompressionConfig, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.parameters import HeadUnit, Unit, allocated_parameters, budget_for_ratio
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare import comparison as compare
from lowrank_core.studio.search import history, search_plan
from lowrank_core.studio.search.pareto_chart import front, front_table
from lowrank_core.studio.search.timeline_chart import living_workers, worker_table
from lowrank_core.studio.search.trial_windows_chart import window_losses
from lowrank_core.studio.shared import allocation_map, run_list
from lowrank_core.studio.shared.formatting import short_duration
from lowrank_core.studio.shared.trial_names import KINDS, kind_of, ratio_words, state_words, trial_label, trial_note, unit_label

SEARCH = SearchConfig(RATIO, trials=12, pruner="wilcoxon")
RANGE = SearchConfig(0.2, max_ratio=0.6, trials=9)


@pytest.fixture
def rich():
    return read_trials(make_run(state="running", config=SEARCH, study=write_rich_study))


@pytest.fixture
def ranged():
    return read_trials(make_run(state="running", config=RANGE, study=write_front))


# kinds of trials


def test_every_kind_of_trial_is_told_apart(rich):
    assert [kind_of(trial) for trial in rich] == [
        *["baseline"] * 3,
        "sampled",
        "stopped early",
        "manual",
        "outside budget",
        "failed",
        "running",
        "waiting",
    ]
    assert {kind_of(trial) for trial in rich} == set(KINDS)


def test_a_trial_is_called_by_what_it_is(rich):
    assert trial_label(rich[2]) == "Lagrangian (equal slopes) (trial 2)"
    assert trial_label(rich[3]) == "Trial 3"
    assert trial_label(rich[5]) == "Manual (trial 5)"


def test_what_became_of_a_trial_is_said_in_words(rich):
    assert "stopped early after 6 windows" in state_words(rich[4])
    assert state_words(rich[6]) == "over the budget: measured, but never the best"
    assert "outside the range of ratios" in state_words(replace(rich[6], label="sampled"))
    assert state_words(rich[7]) == "failed: the objective kl is not finite at this allocation"
    assert state_words(replace(rich[7], error="")) == "failed: its worker ended"
    assert "perplexity" in trial_note(rich[5])
    assert "value" not in trial_note(rich[4])


def test_stopped_trials_count_and_hand_picked_ones_come_on_top(rich):
    now = history.progress(rich, SEARCH)
    assert (now.complete, now.wanted, now.counts.pruned, now.counts.outside, now.counts.manual) == (
        5,
        12,
        1,
        0,
        2,
    )  # one that waits is not counted, nor twice one over the budget
    assert now.seconds == 2.0
    assert now.best.number == 3


def test_a_stopped_trial_stands_at_the_loss_it_showed(rich):
    view = history.history(rich, "kl")
    assert view.trials["partial"][4] == pytest.approx(sum(rich[4].windows.values()) / 6)
    assert view.trials["partial"].notna().sum() == 1
    assert view.trials["best"][4:].eq(0.33).all()
    assert history.history(rich, "bolaco").trials["partial"].isna().all()
    assert list(view.baselines) == ["Uniform", "LoRD, fixed ratios", "Lagrangian (equal slopes)"]


def test_the_trial_table_names_kind_worker_and_start(rich):
    table = history.trials_spec(rich, SEARCH).frame
    assert list(table["kind"][[2, 3, 5]]) == ["Lagrangian (equal slopes)", "sampled ★ best", "Manual"]
    assert list(table["state"][[4, 6]]) == ["stopped early", "outside budget"]
    assert table["worker"][0] == "elsewhere:77"
    assert isinstance(table["started"][8], pd.Timestamp)


def test_variables_are_headed_by_what_they_mean(rich, ranged):
    assert history.search_variables(rich, SEARCH)[0].label == "Kept of q, k"
    assert "before scaling" in history.search_variables(rich, SEARCH)[0].meaning
    assert "not scaled" in history.search_variables(rich, replace(SEARCH, projected=False))[0].meaning
    assert history.search_variables(rich, replace(SEARCH, variables="error_weight"))[1].label == "Weight of o"
    assert [v.label for v in history.search_variables(ranged, RANGE)] == ["Kept of q, k", "Target ratio"]
    layer = replace(rich[3], params={"model.layers.1.mlp.up_proj": 0.5, "gate 0-3": 0.4})
    assert [v.label for v in history.search_variables([layer], SEARCH)] == ["Kept of 1 · up", "Kept of gate 0-3"]
    types = replace(
        layer, params={"experts.gate+experts.up": 1.0, "experts.down_proj 0-3": 1.0, "shared_expert.up_proj": 1.0, "attn.c_proj": 1}
    )
    labels = [v.label for v in history.search_variables([types], replace(SEARCH, variables="error_weight"))]
    roles = ["experts.gate+experts.up", "experts.down 0-3", "shared_expert.up", "attn.c"]
    assert labels == [f"Weight of {role}" for role in roles]


def test_units_are_called_by_block_and_type():
    assert unit_label("model.layers.3.self_attn.q_proj+model.layers.3.self_attn.k_proj") == "3 · q+k"
    assert unit_label("model.layers.3.mlp.up_proj+model.layers.4.mlp.up_proj") == "3+4 · up"
    assert unit_label("lm_head") == "lm_head"


def test_short_times_keep_a_decimal():
    assert [short_duration(value) for value in (0.917, 2.04, 75.0, None)] == ["0.92 s", "2.0 s", "1 min 15 s", "–"]


# the better half


def rows(*values: float, partial: float = math.nan) -> pd.DataFrame:
    stopped = [math.nan] * (len(values) - 1) + [partial]
    return pd.DataFrame({"number": range(len(values)), "value": values, "partial": stopped, "best": values})


def test_the_better_half_leaves_out_what_is_worse_than_the_median_and_keeps_the_best_baseline():
    view = history.History("KL", rows(9.0, 3.0, 1.0, 1.1, 1.2, math.nan), {"Uniform": 9.0, "Lagrangian": 3.0})
    result = history.better_half(view)
    assert list(result.trials["number"]) == [1, 2, 3, 4, 5]  # up to the best baseline, and the one without a value
    assert result.baselines == {"Lagrangian": 3.0}
    result = history.better_half(replace(view, baselines={"Uniform": 9.0, "Lagrangian": 1.0}))
    assert list(result.trials["number"]) == [2, 3, 4, 5]
    assert result.objective == view.objective


def test_a_trial_that_was_stopped_early_stands_in_the_half_of_what_it_saw():
    view = history.History("KL", rows(1.0, 2.0, 3.0, math.nan, partial=9.0), {})
    assert list(history.better_half(view).trials["number"]) == [0, 1]
    view = history.History("KL", rows(1.0, 2.0, 3.0, math.nan, partial=0.5), {})
    assert list(history.better_half(view).trials["number"]) == [0, 3]


def test_before_any_trial_is_measured_nothing_is_left_out():
    view = history.History("KL", rows(math.nan, math.nan), {})
    assert len(history.better_half(view).trials) == 2


# windows


def test_the_running_trial_is_held_against_the_best_on_the_windows_that_both_saw(rich):
    view = window_losses(rich, None, "kl")
    assert (view.shown, view.other, view.running, view.measured) == ("Trial 8", "Trial 3", True, 4)
    assert view.shown_mean == pytest.approx(sum(rich[8].windows.values()) / 4)
    assert view.other_mean == pytest.approx(sum(rich[3].windows[window] for window in range(4)) / 4)
    assert view.frame["shown"].notna().sum() == 4
    assert view.frame["other"].notna().all()


def test_without_a_running_trial_the_chosen_one_is_shown_and_the_best_beside_uniform(rich):
    done = [trial for trial in rich if trial.state != "running"]
    assert window_losses(done, 5, "kl").shown == "Manual (trial 5)"
    best = window_losses(done, None, "perplexity")
    assert (best.shown, best.other, best.measure) == ("Trial 3", "Uniform (trial 0)", "Loss (nats per token)")


def test_without_losses_by_window_there_is_nothing_to_show(ranged):
    assert window_losses(ranged, None, "kl") is None
    assert window_losses(read_trials(make_run()), 3, "kl") is None


# workers


def test_workers_are_listed_with_what_they_do(rich):
    run = make_run(state="running", config=SEARCH, study=write_rich_study)
    me = f"{socket.gethostname()}:{os.getpid()}"
    living = living_workers(run)
    assert list(living) == [me]
    table = worker_table(rich, living, now=rich[8].started + 3).set_index("worker")
    assert table.loc[me, "now"] == "Trial 8, for 3 s"
    assert table.loc["elsewhere:77", "measured"] == 7
    assert table.loc["elsewhere:77", "now"] == "no trial running"
    assert worker_table(rich, {}, 0.0).set_index("worker").loc[me, "now"] == "ended"
    assert worker_table([], {me: running_status("Calibrating")}, 0.0)["now"][0] == "Calibrating"


# a range of ratios


def test_the_front_leaves_out_what_is_beaten(ranged):
    table = front_table(ranged)
    assert list(table["trial"]) == [0, 1, 4, 3]
    assert table["removed"].is_monotonic_increasing
    assert table["value"].is_monotonic_increasing
    view = front(ranged, "kl")
    assert len(view.trials) == len(FRONT)
    assert list(view.best["number"]) == [0, 1, 4, 3]
    assert list(view.baselines["label"]) == ["Uniform", "Uniform"]
    assert front_table([]).empty


def test_a_range_has_no_best_trial(ranged):
    assert history.progress(ranged, RANGE).best is None
    marks = history.trials_spec(ranged, RANGE).frame["kind"]
    assert [number for number, kind in enumerate(marks) if kind.endswith("★ front")] == [0, 1, 3, 4]
    assert ratio_words(RANGE) == "20% to 60%"
    assert ratio_words(replace(RANGE, compression_ratio=0.125, max_ratio=0.996)) == "12.5% to 99.6%"
    run = make_run(config=RANGE, study=write_front)
    assert run_list.run_table([run])["best"].isna().all()
    assert run_list.run_table([run])["ratio"][0] == "20% to 60%"


# plans


def test_a_plan_counts_both_ends_of_a_range_and_the_variables():
    result = search_plan.check_budget(RunConfig(search=replace(RANGE, compression=CompressionConfig(value_dense=False))), matrices())
    assert (result.allowed, result.minimum) == (budget_for_ratio(priced_units(), 0.2), budget_for_ratio(priced_units(), 0.6))
    assert result.variables[-1] == "compression_ratio"


@pytest.mark.parametrize("preset", ["studio", "bolaco"])
def test_recipes_can_be_planned(preset):
    result = search_plan.check_budget(RunConfig(search=search_by(PRESETS[preset], RATIO)), matrices(), heads())
    assert result.dense == sum(m.dense_parameters for m in matrices())
    assert result.variables


def test_the_largest_ratio_of_a_range_must_be_met_too():
    with pytest.raises(BudgetError, match="can't be met"):
        search_plan.check_budget(RunConfig(search=replace(RANGE, max_ratio=0.95)), matrices())


def test_what_the_sampler_can_not_take_is_told_before_the_start():
    wide = SearchConfig(RATIO, space="per-layer", compression=CompressionConfig(value_dense=False))
    many = [replace(m, name=f"{m.name}.{copy}") for m in matrices() for copy in range(2)]
    with pytest.raises(ConfigError, match="variables here"):
        search_plan.check_budget(RunConfig(search=wide), many)
    with pytest.raises(ConfigError, match=f"{BLOCKS} blocks"):
        search_plan.check_budget(RunConfig(search=replace(wide, space="types x 9")), matrices())


def test_what_selecting_windows_takes_is_estimated_too():
    make_run(config=SEARCH, study=write_rich_study)
    base = RunConfig(text=TextConfig(context=63, validation_windows=4), search=search_by(PRESETS["bolaco"], RATIO))
    result, plain = (search_plan.time_estimate(replace(base, search=replace(base.search, selected_windows=n))) for n in (100, 0))
    assert result.trials == pytest.approx(plain.trials * 100 / 4)
    assert result.selecting == pytest.approx(result.trials / 50 / 100 * 20 * 820)
    assert plain.selecting == 0


def test_time_is_estimated_from_earlier_trials_of_the_same_model():
    config = RunConfig(text=TextConfig(context=63, validation_windows=4), search=SearchConfig(RATIO, trials=10))
    assert search_plan.time_estimate(config) is None
    make_run(config=SEARCH, study=write_rich_study)
    assert search_plan.time_estimate(config).trials == pytest.approx(10 * 2.0 / 124 * 4 * 62)
    assert search_plan.time_estimate(replace(config, model=replace(config.model, reference="other/model"))) is None
    assert search_plan.time_estimate(replace(config, search=None)) is None


# alternatives, and allocations manually


def heads() -> tuple[HeadUnit, ...]:
    by_name = {m.name: m for m in matrices()}
    pairs = [(f"model.layers.{d}.self_attn.v_proj", f"model.layers.{d}.self_attn.o_proj") for d in range(BLOCKS)]
    return tuple(HeadUnit((by_name[v], by_name[o]), heads=2, groups=1, head_dim=12) for v, o in pairs)


def studio_units() -> tuple[Unit, ...]:
    shapes = [replace(m, input_group=f"{m.depth}.{m.kind in ('gate_proj', 'up_proj')}") for m in matrices()]
    return plan_units(shapes, PRESETS["studio"].compression, heads())


def test_the_map_draws_each_matrix_once_whatever_unit_holds_it():
    units = studio_units()
    pair = next(unit for unit in units if isinstance(unit, HeadUnit))
    stack = next(unit for unit in units if unit.kind == "gate_proj+up_proj")
    result = allocation_from_ranks("manual", units, {pair.name: 4, stack.name: 5})
    frame = allocation_map.allocation_map(result, units).frame.set_index("module")
    assert len(frame) == len(matrices())
    spent = sum(frame.loc[m.name, "value"] * m.dense_parameters for m in matrices())
    assert spent == pytest.approx(allocated_parameters(units, result.ranks))
    assert frame.loc[pair.members[0].name, "value"] == pytest.approx(pair.parameters(4) / pair.dense_parameters)
    assert "by heads" in frame.loc[pair.members[1].name, "label"]
    assert "as one stack" in frame.loc[stack.members[0].name, "label"]


def test_a_table_of_ranks_has_a_row_for_each_unit():
    units = priced_units()
    table = allocation_map.rank_table(allocation_from_ranks("manual", units, {units[0].name: 5}, locked=[units[0].name]), units)
    assert table["rank"].isna().sum() == len(units) - 1
    assert table.iloc[0].to_dict() == {"layer": "0 · q", "rank": 5, "most": units[0].break_even_rank, "locked": True}


# answers


def test_confirmed_trials_stand_beside_what_the_search_saw():
    run = make_run()
    write_answers(run)
    result = compare.confirmed(results(run), read_trials(run))
    assert list(result.frame["name"]) == ["Dense", "Trial 3"]
    row = result.frame.iloc[1]
    assert (row["value"], row["kl"], row["kl_low"], row["kl_high"]) == (0.35, 0.35, 0.3, 0.4)
    assert row["low"] < row["perplexity"] < row["high"]
    assert "test split" in result.protocol
    assert compare.confirmed([], read_trials(run)) is None


def test_hand_picked_trials_are_filed_by_number():
    bodies = [comparison("manual", 5, 3.3), comparison("manual", 6, 3.4)]
    assert [result.label for result in compare.comparisons(bodies)] == ["trial 5", "trial 6"]


def test_what_was_said_to_a_hand_picked_allocation_is_told_where_it_was_picked():
    refused = {"ok": False, "kind": "measure", "error": "ranks: 'x' is no compressible layer", "time": 1.0}
    assert compare.last_failure([comparison("uniform", "uniform", 3.4), refused]) is None

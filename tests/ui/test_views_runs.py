"""A search, its comparisons and the list of runs, as numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from synthetic import (
    DENSE_NLL,
    RATIO,
    comparison,
    make_run,
    matrices,
    model_json,
    priced_units,
    running_status,
    write_answers,
)

from lowrank_core.allocation.units import plan_units
from lowrank_core.config import CompressionConfig, RunConfig, SearchConfig
from lowrank_core.errors import BudgetError
from lowrank_core.parameters import allocated_parameters, budget_for_ratio
from lowrank_core.runs import RunStatus, write_json
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.requests import ExportAnswer, answers_in
from lowrank_core.studio.compare import comparison as compare
from lowrank_core.studio.compare import continuations, loss_details
from lowrank_core.studio.search import history, search_plan
from lowrank_core.studio.shared import allocation_map, run_list


def test_the_history_keeps_the_best_so_far_over_a_failed_trial():
    view = history.history(read_trials(make_run()), "kl")
    assert list(view.trials["best"]) == pytest.approx([0.41, 0.41, 0.41, 0.35, 0.35, 0.35])
    assert math.isnan(view.trials["value"][4])
    assert view.trials["state"][4] == "failed"
    assert view.baselines == {"Uniform": 0.41, "LoRD, fixed ratios": 0.44}


def test_a_history_without_any_value_has_no_best():
    run = make_run(state="running")
    last = read_trials(run)[-1]
    view = history.history([last], "kl")
    assert view.trials["best"].isna().all()
    assert view.baselines == {}


def test_a_trial_outside_the_budget_is_shown_and_never_the_best():
    trials = read_trials(make_run())
    trials[1] = replace(trials[1], state="infeasible", value=0.01)
    view = history.history(trials, "kl")
    assert list(view.trials["best"]) == pytest.approx([0.41, 0.41, 0.41, 0.35, 0.35, 0.35])
    assert view.baselines == {"Uniform": 0.41}
    assert history.progress(trials, SearchConfig(trials=6)).complete == 5
    assert history.progress(trials, SearchConfig(trials=6)).best.number == 3


def test_progress_is_told_against_uniform():
    now = history.progress(read_trials(make_run()), SearchConfig(trials=6))
    assert (now.complete, now.wanted, now.best.number) == (5, 6, 3)
    assert now.gain == pytest.approx(1 - 0.35 / 0.41)
    assert history.progress([], SearchConfig()).gain is None


def test_the_trial_table_marks_the_best_and_has_a_column_for_each_variable():
    trials = read_trials(make_run())
    table = history.trials_spec(trials, SearchConfig()).frame
    assert list(table["trial"]) == list(range(6))
    assert table["kind"][3] == "sampled ★ best"
    assert table["kind"][0] == "Uniform"
    assert {result.name for result in history.search_variables(trials, SearchConfig())} <= set(table.columns)
    assert history.trials_spec([], SearchConfig()).frame.empty


def test_the_allocation_map_spends_what_the_allocation_counts():
    trial = read_trials(make_run())[3]
    units = plan_units(matrices(), CompressionConfig())
    assert list(units) == priced_units()
    result = allocation_map.allocation_of(trial, units)
    view = allocation_map.allocation_map(result, units)
    spent = sum(value * unit.dense_parameters for value, unit in zip(view.frame["value"], units, strict=True))
    assert spent == pytest.approx(allocated_parameters(units, trial.ranks))
    assert (view.frame.loc[view.frame["kind"] == "v_proj", "label"] == "dense").all()
    assert result.compression_ratio >= RATIO


def test_the_allocation_that_is_downloaded_can_be_read_again(tmp_path):
    from lowrank_core.allocation import read_ranks

    trial = read_trials(make_run())[3]
    path = tmp_path / "allocation.json"
    path.write_text(allocation_map.allocation_of(trial, priced_units()).to_json())
    assert read_ranks(path) == dict(trial.ranks)


def test_a_ratio_that_can_not_be_met_is_told_before_the_start():
    shapes = [m for m in matrices() if m.kind in ("q_proj", "v_proj")]
    with pytest.raises(BudgetError, match="can't be met"):
        search_plan.check_budget(RunConfig(search=SearchConfig(compression_ratio=0.8)), shapes)
    assert search_plan.check_budget(RunConfig(), shapes) is None
    result = search_plan.check_budget(RunConfig(search=SearchConfig(compression_ratio=RATIO)), matrices())
    assert result.allowed == result.minimum == budget_for_ratio(priced_units(), RATIO)
    assert result.variables == ("qk", "o", "gate", "up", "down")


# comparisons


def test_the_newest_measurement_of_an_allocation_counts():
    bodies = [comparison("trial 3", 3, 3.6), comparison("uniform", "uniform", 3.4), comparison("trial 3", 3, 3.2)]
    result = compare.comparisons(bodies)
    assert [c.label for c in result] == ["trial 3", "uniform"]
    assert result[0].perplexity == pytest.approx(math.exp(3.2))


def test_the_comparison_table_begins_with_the_original():
    run = make_run()
    write_answers(run)
    bodies = results(run)
    table = loss_details.comparison_table(compare.comparisons(bodies))
    assert list(table["allocation"]) == ["Dense", "Trial 3", "Uniform"]
    assert table["perplexity"][0] == pytest.approx(math.exp(DENSE_NLL))
    assert table["removed"][0] == 0.0
    assert table["low"][0] < table["perplexity"][0] < table["high"][0]
    assert [prompt.texts for prompt in continuations.prompts(bodies)] == [(("Trial 3", "self):"),)]
    assert [answer.path.endswith("trial-3") for answer in answers_in(bodies, ExportAnswer)] == [True]
    assert compare.last_failure(bodies) is None


def test_only_the_newest_answer_counts_as_a_failure():
    failed = {"ok": False, "kind": "export", "error": "disk full", "time": 1.0}
    assert compare.last_failure([comparison("uniform", "uniform", 3.4), failed]).error == "disk full"
    assert compare.last_failure([failed, comparison("uniform", "uniform", 3.4)]) is None


def test_a_trial_is_filed_under_its_baselines_name():
    trials = read_trials(make_run())
    assert compare.label_of(0, trials) == "uniform"
    assert compare.label_of(3, trials) == "trial 3"
    assert compare.label_of("lord_manual", trials) == "lord_manual"


# runs


def test_the_newest_run_with_data_is_shown_first():
    older = make_run()
    make_run(parts=False, state="failed")
    assert run_list.default_run().id == older.id
    started = make_run(parts=False, state="running")
    assert run_list.default_run().id == started.id


def test_without_a_run_the_recorded_one_is_shown(monkeypatch, tmp_path):
    assert run_list.default_run() is None
    recorded = make_run(path=tmp_path / "recorded-run")
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: recorded)
    assert run_list.default_run() == recorded


def test_labels_differ_and_last():
    first, second = make_run(), make_run()
    labels = run_list.run_labels([second, first])
    assert len(set(labels.values())) == 2
    assert run_list.run_labels([first])[first.id] == labels[first.id]


def test_the_run_table_counts_complete_trials():
    run = make_run()
    table = run_list.run_table([run])
    assert (table["trials"][0], table["best"][0], table["ratio"][0]) == (5, 0.35, "30%")


def test_a_resumed_warm_worker_counts_as_busy_before_it_says_so():
    run = make_run(state="running")
    assert run_list.is_busy(run)
    run.write_status(replace(running_status(), state="stopped"))
    assert run_list.is_busy(run)  # alive, and nothing holds it back
    run.pause_marker.touch()
    assert not run_list.is_busy(run)
    write_json(run.path / "requests" / "1-ab.json", {"id": "1-ab", "kind": "compare", "arguments": {}})
    assert run_list.is_busy(run)


def test_the_signature_changes_when_a_page_has_more_to_show():
    run = make_run(parts=False, state="running")
    before = run_list.signature(run)
    assert run_list.signature(run) == before
    run.write_status(running_status("Searching", 9))
    assert run_list.signature(run) == before  # progress within a stage redraws nothing
    write_json(run.path / "model.json", model_json())
    assert run_list.signature(run) != before


def test_status_words_need_no_total():
    assert run_list.status_words(RunStatus("running", "Loading")) == ""
    assert run_list.status_words(RunStatus("running", "Calibrating", 24, 256, 12.0)) == "24 of 256 · about 12 s left"
    assert run_list.status_words(RunStatus("stopped", "", 24, 256, 12.0)) == "24 of 256"

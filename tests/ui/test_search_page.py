"""The Rank search page as a user meets it: every kind of trial, a range of ratios, and steering."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic import (
    RATIO,
    make_run,
    model_json,
    write_answers,
    write_front,
    write_long_study,
    write_rich_study,
)
from test_pages import charts, sound, words
from walking import open_panel

from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs import Run, list_runs, write_json
from lowrank_core.studies import gain
from lowrank_core.studies.records import pareto_front, read_trials
from lowrank_core.studio.shared.trial_names import trial_label

RICH = SearchConfig(RATIO, trials=12, pruner="wilcoxon")
RANGE = SearchConfig(0.2, max_ratio=0.6, trials=9)


@pytest.fixture
def rich() -> Run:
    return make_run(state="running", config=RICH, study=write_rich_study)


def started(base: Run | None = None) -> SearchConfig:
    """Return the search of the run that was started next to ``base``."""
    (run,) = [run for run in list_runs() if base is None or run.id != base.id]
    result = run.config.search
    assert result is not None
    return result


# the form


def test_our_recipe_is_the_default(app):
    base = make_run(search=False)
    test = app("search")
    test.slider(key="search_ratio").set_value(40)
    test.button(key="start_search").click().run()
    assert sound(test)
    assert started(base) == search_by(PRESETS["studio"], 0.4)


def test_everything_under_advanced_reaches_the_search(app):
    base = make_run(search=False)
    test = app("search")
    test.selectbox(key="search_space").set_value("types").run()
    test.number_input(key="search_depth_groups").set_value(3)
    test.selectbox(key="search_sampler").set_value("cmaes")
    test.selectbox(key="search_pruner").set_value("wilcoxon")
    test.number_input(key="search_seed").set_value(7)
    test.number_input(key="search_top_k").set_value(64)
    test.number_input(key="search_confirmed").set_value(1)
    test.toggle(key="search_autocast").set_value(True)
    test.toggle(key="search_stop_when_flat").set_value(True)
    test.button(key="start_search").click().run()
    assert sound(test)
    wanted = {"space": "types x 3", "sampler": "cmaes", "pruner": "wilcoxon", "seed": 7, "top_k": 64, "confirmed": 1, "autocast": True}
    assert started(base) == replace(search_by(PRESETS["studio"], 0.2), stop_when_flat=True, **wanted)


def test_ones_own_recipe_may_trade_errors_with_alternatives(app):
    base = make_run(search=False)
    test = app("search")
    test.segmented_control(key="search_recipe").set_value("own").run()
    assert test.toggle(key="search_stacks").disabled
    test.selectbox(key="search_variables").set_value("error_weight")
    test.toggle(key="search_value_dense").set_value(False).run()
    test.toggle(key="search_stacks").set_value(True)
    test.toggle(key="search_heads").set_value(True)
    test.button(key="start_search").click().run()
    assert sound(test)
    result = started(base)
    assert result.variables == "error_weight"
    assert result.compression == CompressionConfig(value_dense=False, stacks=True, heads=True)


def test_a_depth_bias_is_searched_with_error_weights_of_a_deep_cut(app):
    base = make_run(search=False)
    test = app("search")
    assert test.toggle(key="search_deep_weights").disabled
    test.selectbox(key="search_space").set_value("depth")
    test.toggle(key="search_error_weights").set_value(True).run()
    test.toggle(key="search_deep_weights").set_value(True)
    assert "2 variables" in words(test.run())
    test.button(key="start_search").click().run()
    assert sound(test)
    wanted = {"space": "depth", "error_weights": True, "deep_weights": True}
    assert started(base) == replace(search_by(PRESETS["studio"], 0.2), **wanted)


def test_shrinkage_and_robust_gradients_are_of_ones_own_recipe(app):
    base = make_run(search=False)
    test = app("search")
    test.segmented_control(key="search_recipe").set_value("own").run()
    test.selectbox(key="search_basis").set_value("two_sided_uncentred")
    test.number_input(key="search_input_shrinkage").set_value(0.1)
    test.number_input(key="search_gradient_shrinkage").set_value(0.3)
    test.toggle(key="search_robust_gradients").set_value(True)
    test.button(key="start_search").click().run()
    assert sound(test)
    wanted = CompressionConfig("two_sided_uncentred", input_shrinkage=0.1, gradient_shrinkage=0.3, robust_gradients=True)
    assert started(base).compression == wanted


def test_a_range_of_ratios_is_asked_for_with_one_toggle(app):
    base = make_run(search=False)
    test = app("search")
    test.toggle(key="search_far").set_value(True).run()
    assert test.selectbox(key="search_pruner").disabled
    assert "down to" in words(test)
    test.slider(key="search_ratios").set_value((30, 50))
    test.button(key="start_search").click().run()
    assert sound(test)
    result = started(base)
    assert (result.compression_ratio, result.max_ratio) == (0.3, 0.5)


def test_choices_that_do_not_go_together_are_explained_and_nothing_starts(app):
    base = make_run(search=False)
    test = app("search")
    test.toggle(key="search_far").set_value(True)
    test.selectbox(key="search_sampler").set_value("cmaes").run()
    assert not test.exception
    assert "CMA-ES has one objective" in test.error[0].value
    assert test.button(key="start_search").disabled
    assert [run.id for run in list_runs()] == [base.id]


def test_too_many_depth_groups_are_refused_before_anything_starts(app):
    make_run(search=False)
    test = app("search")
    test.selectbox(key="search_space").set_value("types").run()
    test.number_input(key="search_depth_groups").set_value(9)
    test.button(key="start_search").click().run()
    assert "3 blocks" in test.error[0].value
    assert len(list_runs()) == 1


def test_the_time_is_estimated_only_where_trials_were_measured(app):
    make_run(search=False)
    assert "No time estimate before the first trial" in words(app("search"))
    make_run(config=RICH, study=write_rich_study)
    shown = words(app("search"))
    assert "Estimate: about **6 min 00 s** for the trials" in shown
    assert "going by trials of the same model, text and windows" in shown


# the live part


def test_every_kind_of_trial_is_on_the_page(app, rich):
    test = app("search")
    assert sound(test)
    shown = words(test)
    assert "5 of 12 trials complete" in shown
    assert "2.0 s per trial (median) · 1 stopped early · 2 manual, on top · 1 failed, not counted" in shown
    assert "Best trial Trial 3" in shown
    assert "Trial 8, running now, against Trial 3 window by window" in shown
    assert len(charts(test)) == 3  # history, windows, allocation; one trial has no fingerprint
    open_panel(test, "workers_panel")
    assert sound(test)
    assert len(charts(test)) == 4  # and the timeline


def test_the_better_half_alone_can_be_looked_at_and_says_how_much_is_left_out(app, rich):
    test = app("search")
    assert "Left out" not in words(test)
    test.toggle(key="history_near").set_value(True).run()
    assert sound(test)
    assert "The better half of the trials on search-validation text" in words(test)
    assert "**Left out**, as worse than half of the trials: 5 points and lines." in words(test)
    assert len(charts(test)) == 3


def test_a_search_shows_what_its_trials_were_made_of_and_what_is_missing(app):
    make_run()
    test = app("search")
    assert sound(test)
    shown = words(test)
    assert "Trial parameters, best at the left" in shown
    assert "The importance of variables can't be estimated from 5 trials that set them all: 11 more sampled trials are needed." in shown


def test_which_variables_mattered_is_shown_once_there_are_trials(app):
    make_run(config=replace(RICH, trials=20), study=write_long_study)
    test = app("search")
    assert sound(test)
    assert "Importance of variables" in words(test)
    assert "A Gaussian process fitted to 20 trials" in words(test)
    assert "variance of the KL divergence over the whole search space" in words(test)


@pytest.mark.parametrize(("trial", "said"), [("4", "stopped early after 6 windows"), ("6", "over the budget"), ("7", "not finite")])
def test_a_trial_that_did_not_count_says_why(app, rich, trial, said):
    test = app("search", trial=trial)
    assert sound(test)
    assert said in words(test)


def test_workers_are_listed(app, rich):
    test = app("search")
    assert not [frame for frame in test.dataframe if "now" in frame.value.columns]  # sent only where it is seen
    open_panel(test, "workers_panel")
    assert "Timeline of workers and trials" in words(test)
    tables = [frame.value for frame in test.dataframe]
    (workers,) = [frame for frame in tables if "now" in frame.columns]
    assert list(workers["measured"]) == [0, 7]
    assert workers["now"][0].startswith("Trial 8")


@pytest.mark.parametrize("page", ["overview", "search", "compare"])
def test_a_range_of_ratios_has_a_front_instead_of_a_best_trial(app, page):
    run = make_run(state="running", config=RANGE, study=write_front)
    test = app(page, run=run.id)
    assert sound(test)
    assert "20% to 60%" in words(test) or page != "search"
    assert "Best" not in words(test)
    if page == "search":
        assert "On the front 4 trials" in words(test)
        assert "Loss against compression ratio" in words(test)
    if page == "compare":
        front = pareto_front(read_trials(run))
        options = test.multiselect[0].options[: len(front)]
        assert all(option.startswith(f"{trial_label(trial)}, ") for option, trial in zip(options, front, strict=True))


def test_a_trial_of_the_front_can_be_chosen(app):
    make_run(config=RANGE, study=write_front)
    test = app("search", trial="4")
    assert sound(test)
    assert "Where Trial 4 keeps its parameters" in words(test)


def test_a_search_by_our_recipe_is_drawn_with_its_stacks_and_heads(app):
    def study(run: Run) -> None:
        body = model_json()
        heads = [
            {"value": f"model.layers.{d}.self_attn.v_proj", "output": f"model.layers.{d}.self_attn.o_proj", "heads": 2, "groups": 1}
            for d in range(3)
        ]
        write_json(run.path / "model.json", {**body, "heads": [{**entry, "head_dim": 12} for entry in heads]})
        write_rich_study(run)

    make_run(config=replace(search_by(PRESETS["studio"], RATIO), trials=6), study=study)
    test = app("search")
    assert sound(test)
    assert "Where Trial 3 keeps its parameters" in words(test)


def test_confirmed_trials_are_shown_with_their_text(app):
    write_answers(make_run())
    shown = words(app("search"))
    assert "Confirmed on test text" in shown
    assert "No trial used this text" in shown


def test_a_search_says_what_it_added_over_its_best_rule(app, rich):
    assert (
        "Over the best rule, Lagrangian (equal slopes) (trial 2), the search added (Trial 3): on validation text, KL 8.33% lower"
        in words(app("search"))
    )


def test_a_search_that_stopped_by_itself_says_why_and_is_extended_from_there(app, monkeypatch):
    monkeypatch.setattr(gain, "FLAT_TRIALS", 2)
    run = make_run(config=SearchConfig(RATIO, trials=60, startup_trials=2, stop_when_flat=True))
    test = app("search")
    shown = words(test)
    assert "5 of 5 trials complete" in shown
    assert "Stopped by itself after 4 of 60 trials" in shown
    test.number_input(key="extend_by").set_value(7)
    test.button(key="extend").click().run()
    assert (run.config.search.trials, run.config.search.stop_when_flat) == (12, False)


def test_a_failed_search_says_why_and_can_be_resumed(app):
    make_run(state="failed")
    test = app("search")
    assert sound(test) or [error.value for error in test.error] == ["model: the loss of layer 3 is not finite."]
    assert not test.exception
    assert any(button.label == "Resume" for button in test.button)


# steering


def test_extending_changes_the_run_and_goes_on(app):
    run = make_run()
    run.pause_marker.touch()
    test = app("search")
    test.number_input(key="extend_by").set_value(7)
    test.button(key="extend").click().run()
    assert sound(test)
    assert run.config.search.trials == 13
    assert not run.pause_marker.exists()
    assert run.status().state == "queued"


def test_the_sampler_is_changed_from_the_next_trial_on(app, rich):
    test = app("search")
    assert test.button(key="use_sampler").disabled
    test.selectbox(key=f"sampler_now_{rich.id}").set_value("tpe").run()
    test.button(key="use_sampler").click().run()
    assert sound(test)
    assert rich.config.search.sampler == "tpe"


def test_a_sampler_that_the_search_can_not_have_is_refused(app):
    run = make_run(config=RANGE, study=write_front)
    test = app("search")
    test.selectbox(key=f"sampler_now_{run.id}").set_value("cmaes").run()
    test.button(key="use_sampler").click().run()
    assert "CMA-ES has one objective" in test.error[0].value
    assert not test.exception
    assert run.config.search.sampler == "gp"


def test_a_worker_is_added_where_one_works(app, rich, monkeypatch):
    asked = []
    monkeypatch.setattr("lowrank_core.runs.client._spawn", lambda run, warm, *options: asked.append(options))
    test = app("search")
    test.button(key="add_worker").click().run()
    assert sound(test)
    assert asked == [("--join",)]


def test_nobody_can_be_added_to_a_search_without_a_worker(app):
    make_run()
    assert app("search").button(key="add_worker").disabled


def test_the_command_of_optunas_dashboard_is_given(app):
    run = make_run()
    assert any(f"optuna-dashboard {run.journal}" in code.value for code in app("search").code)


def test_a_recorded_run_can_not_be_steered(app, tmp_path, monkeypatch):
    run = make_run(path=tmp_path / "recorded-run")
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("search")
    assert sound(test)
    assert not {"extend", "use_sampler", "add_worker"} & {button.key for button in test.button}

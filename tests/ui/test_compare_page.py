"""The Compare page: what it shows in every state, and what it asks of the worker."""

from __future__ import annotations

import json
from dataclasses import replace

import optuna
import pandas as pd
import pytest
from optuna.trial import create_trial
from synthetic import comparison, make_run, running_status, write_answers, write_healing
from synthetic_answers import behaviour_answer, detailed, on_other_text, speed_answer, tokens_answer
from test_pages import charts, sound, words

from lowrank_core.config.evaluation import BehaviourConfig
from lowrank_core.config.speed import SpeedConfig
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.runs import client, write_json
from lowrank_core.runs.client import pending_requests, results
from lowrank_core.studies.records import MANUAL
from lowrank_core.studies.requests import BehaviourRequest, CompareRequest, OtherTextRequest, SpeedRequest, TokensRequest, request_of
from lowrank_core.studies.storage import open_journal
from lowrank_core.studio.compare.comparison import comparisons
from lowrank_core.studio.compare.measured_speed import speeds
from lowrank_core.studio.compare.token_losses import strips
from lowrank_core.studio.report import report_html
from lowrank_core.studio.shared.table import Column, Table
from pages.components.tables import _without_negative_zeros

LOOKS = ("windows", "positions", "tokens", "text", "prompt", "speed")


@pytest.fixture
def dead_worker(monkeypatch):
    """As if every worker died at once: requests stay where they are."""
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: None)


def full_run():
    run = make_run()
    write_answers(run)
    bodies = [detailed(comparison("trial 3", 3, 3.2)), on_other_text("trial 3", 3, 4.0), tokens_answer(), speed_answer()]
    for number, body in enumerate(bodies, start=10):
        write_json(run.path / "results" / f"{number}.json", body)
    return run


def open_study(run):
    return optuna.load_study(study_name=run.study_name, storage=open_journal(run.journal))


def asked(run):
    return [request_of(request["kind"], request["arguments"]) for request in pending_requests(run)]


def look(app, name, **query):
    test = app("compare", **query)
    return test.segmented_control(key="compare_look").set_value(name).run()


@pytest.mark.parametrize(
    ("name", "said", "drawn"),
    [
        ("windows", "better than the dense model on 0 % of 4 windows", 3),
        ("positions", "Trial 3: loss by tokens of context", 2),
        ("tokens", "half of the extra loss lies in 1 of 4 tokens", 1),
        ("text", "Largest gap: Trial 3", 2),
        ("prompt", "Compressed, Trial 3", 1),
        ("speed", "batch 1, prompts of 8 random tokens", 2),
    ],
)
def test_each_look_shows_what_was_measured(app, name, said, drawn):
    full_run()
    test = look(app, name)
    assert sound(test)
    assert said in words(test)
    assert len(charts(test)) == drawn
    assert "nan" not in words(test).lower().split()


@pytest.mark.parametrize("name", LOOKS)
def test_each_look_without_anything_measured_says_what_to_do(app, name):
    make_run()
    test = look(app, name)
    assert sound(test)
    assert "Nothing measured yet" in words(test)
    assert not charts(test)


@pytest.mark.parametrize("name", LOOKS)
def test_each_look_of_a_recorded_run_shows_results_and_asks_for_nothing(app, name, tmp_path, monkeypatch):
    run = full_run()
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    test = look(app, name)
    assert sound(test)
    buttons = [button for button in test.button if button.key in ("measure", "measure_presets", "measure_second", "read_tokens", "heal")]
    assert buttons
    assert all(button.disabled for button in buttons)


def test_an_older_answer_without_windows_or_positions_is_told(app):
    run = make_run()
    write_answers(run)
    test = look(app, "positions", run=run.id)
    assert sound(test)
    assert "was measured before this was recorded" in words(test)


def test_only_what_is_missing_is_asked_for(app, dead_worker):
    run = make_run()
    write_answers(run)  # trial 3 and uniform
    test = app("compare")
    assert "2 of 4 measured or queued" in words(test)
    test.button(key="measure").click().run()
    assert sound(test)
    assert asked(run) == [CompareRequest("lord_manual"), CompareRequest("lagrangian")]
    assert test.button(key="measure").disabled
    assert "4 of 4 measured or queued" in words(test)


def test_one_press_asks_for_every_preset(app, dead_worker):
    run = make_run()
    test = app("compare")
    test.button(key="measure_presets").click().run()
    assert [request.trial for request in asked(run)] == [f"preset:{name}" for name in PRESETS]
    assert test.button(key="measure_presets").disabled


def test_requests_can_be_withdrawn_one_by_one_or_all(app, dead_worker):
    run = make_run()
    names = [client.submit(run, "compare", trial=trial) for trial in (3, "uniform", "lagrangian")]
    test = app("compare", run=run.id)
    assert "3 requests are queued" in words(test)
    assert "Uniform: measuring on test text" in words(test)
    test.button(key=f"withdraw_{names[1]}").click().run()
    assert [request.trial for request in asked(run)] == [3, "lagrangian"]
    test.button(key="withdraw_all").click().run()
    assert asked(run) == []
    assert "are queued" not in words(test)


def test_a_worker_at_work_shows_stage_and_time_left(app):
    run = make_run(state="running")
    client.submit(run, "compare", trial="preset:svd")
    run.write_status(running_status("Factorising by Weight SVD", 3, 40))
    test = app("compare", run=run.id)
    assert sound(test)
    shown = " ".join(element.proto.text for element in test.get("progress"))
    assert "Factorising by Weight SVD · 3 of 40 · about 12 s left" in shown


def test_a_preset_that_could_not_be_measured_is_told_with_its_reason(app):
    run = make_run()
    write_answers(run)
    body = {"ok": False, "error": "0.9 can't be met", "kind": "compare", "arguments": {"trial": "preset:bolaco"}, "time": 1.0}
    write_json(run.path / "results" / "9.json", body)
    test = app("compare")
    assert sound(test)
    assert "Bolaco, as published, fixed ratios** was not measured: 0.9 can't be met" in words(test)


def test_a_second_text_is_asked_for_with_what_is_missing_on_the_first(app, dead_worker, tmp_path):
    run = make_run()
    write_answers(run)
    notes = tmp_path / "notes.txt"
    notes.write_text("some words")
    test = look(app, "text")
    test.multiselect[0].set_value([3, "lagrangian"]).run()
    test.text_input(key="second_text_path").set_value(str(notes)).run()
    test.button(key="measure_second").click().run()
    assert sound(test)
    text = f"file:{notes}"
    assert asked(run) == [OtherTextRequest(3, text), CompareRequest("lagrangian"), OtherTextRequest("lagrangian", text)]


def test_a_second_text_that_is_not_there_is_refused_before_it_is_asked_for(app, dead_worker):
    run = make_run()
    test = look(app, "text")
    test.text_input(key="second_text_path").set_value("/no/such.txt").run()
    test.button(key="measure_second").click().run()
    assert "There is no file /no/such.txt" in test.error[0].value
    assert asked(run) == []


def test_a_window_or_a_text_is_read_token_by_token(app, dead_worker):
    run = make_run()
    write_answers(run)
    test = look(app, "tokens")
    test.number_input(key=f"token_window_{run.id}").set_value(3).run()
    test.button(key="read_tokens").click().run()
    test.segmented_control(key="token_source").set_value("text").run()
    test.text_area(key="token_text").set_value("<b>mine</b>").run()
    test.button(key="read_tokens").click().run()
    assert sound(test)
    assert asked(run) == [TokensRequest(3, window=3), TokensRequest(3, "<b>mine</b>")]
    test.text_area(key="token_text").set_value("  ").run()
    test.button(key="read_tokens").click().run()
    assert "The text is empty" in test.warning[-1].value


def test_tokens_of_hostile_text_reach_the_page_as_text(app):
    run = make_run()
    body = tokens_answer(pieces=["a", "<img src=x onerror=alert(1)>", "&", " b", "c"])
    write_json(run.path / "results" / "1.json", body)
    test = look(app, "tokens")
    assert sound(test)
    (strip,) = [element.proto.body for element in test.get("html") if "onerror" in element.proto.body]
    assert "<img" not in strip


def test_prompts_and_timings_are_asked_of_every_chosen_model(app, dead_worker):
    run = make_run()
    test = look(app, "speed")
    test.multiselect[0].set_value([3, "preset:svd_llm"]).run()
    test.number_input(key="speed_rounds").set_value(3)
    test.checkbox(key="speed_memory").set_value(False)
    test.button(key="time_models").click().run()
    assert sound(test)
    assert asked(run) == [SpeedRequest(trial, False, SpeedConfig(rounds=3)) for trial in (3, "preset:svd_llm")]


def test_behaviour_is_measured_on_request_and_stands_under_the_continuations(app, dead_worker):
    run = make_run()
    for number, label in enumerate(("trial 3", "uniform"), start=10):
        body = behaviour_answer(label, 3 if label == "trial 3" else label)
        write_json(run.path / "results" / f"{number}.json", body)
    test = look(app, "prompt")
    (frame,) = [each.value for each in test.dataframe if "repeated" in each.value]
    assert list(frame["model"]) == ["Dense", "Trial 3", "Uniform (trial 0)"]
    assert list(frame["ended"]) == ["50.0%", "no end token", "no end token"]
    assert list(frame["ratio"]) == [1.0, 2.0, 2.0]
    assert "6 prompts" in words(test)
    test.number_input(key="behaviour_prompts").set_value(4)
    test.button(key="measure_behaviour").click().run()
    assert sound(test)
    assert asked(run)[0] == BehaviourRequest(3, BehaviourConfig(prompts=4))


def test_a_healed_model_can_be_chosen_like_any_other(app, dead_worker):
    run = make_run()
    write_healing(run)
    test = look(app, "prompt")
    key = "healed:trial-3-distill-12345678"
    test.multiselect[0].set_value([key]).run()
    assert test.button(key="measure").disabled  # its healing measured it
    test.button(key="continue").click().run()
    assert [(request.kind, request.trial) for request in asked(run)] == [("generate", key)]


def test_the_choice_survives_a_better_trial_and_another_page(app):
    run = make_run(state="running")
    test = app("compare", run=run.id)
    test.multiselect[0].set_value([3, "uniform"]).run()
    study = open_study(run)
    better = study.trials[3]
    study.add_trial(create_trial(value=0.1, user_attrs=better.user_attrs, state=better.state))
    test.run()
    assert sound(test)
    assert test.multiselect[0].value == [3, "uniform"]  # though trial 3 is the best no more
    test.multiselect[0].set_value(["lagrangian"]).run()
    test.switch_page("pages/search.py").run()
    test.switch_page("pages/compare.py").run()
    assert test.multiselect[0].value == ["lagrangian"]


def test_a_gap_between_texts_is_told_without_looking_closer(app):
    full_run()
    assert "Second text. Largest gap: Trial 3 has 1.221 times" in words(app("compare"))


def test_nothing_chosen_is_not_an_error(app):
    run = make_run()
    write_answers(run)
    test = app("compare", run=run.id)
    test.multiselect[0].set_value([]).run()
    for name in LOOKS:
        test.segmented_control(key="compare_look").set_value(name).run()
        assert sound(test), name
    assert test.button(key="measure").disabled


def test_a_damaged_answer_becomes_a_message(app):
    run = make_run()
    body = comparison("trial 3", 3, 3.2)
    del body["report"]["kl"]
    write_json(run.path / "results" / "1.json", json.loads(json.dumps(body)))
    test = app("compare")
    assert not test.exception
    assert "a comparison has no 'kl'" in test.error[0].value


NOTHING = "the dense model is no better than a uniform guess on this text: KL and agreement say nothing."


def of_one_window() -> dict[str, object]:
    """An answer of an older worker, which drew intervals of no width from one window, with what a newer one says of it."""
    body = comparison("trial 3", 3, 3.2)
    report = body["report"]
    assert isinstance(report, dict)
    report |= {name: [1.0, 1.0] for name in report if name.endswith("_interval")}
    report |= {"windows": 1, "kl": 0.0, "top1_agreement": 1.0, "warnings": [NOTHING, "one window of text alone: there is no interval"]}
    return body


def test_one_window_has_no_interval_and_a_silent_model_is_told_beside_its_figures(app):
    run = make_run()
    write_json(run.path / "results" / "1.json", of_one_window())
    (result,) = comparisons(results(run))
    assert (result.perplexity_interval, result.perplexity_difference_interval, result.kl_interval) == ((), (), ())
    test = look(app, "windows")
    assert sound(test)
    reported = [warning.value for warning in test.warning]
    assert NOTHING in reported
    assert any("one window of text alone" in warning for warning in reported)
    (table,) = (frame.value for frame in test.dataframe if "difference_interval" in frame.value.columns)
    assert list(table["interval"]) == ["no interval", "no interval"]
    assert list(table["difference_interval"]) == ["–", "no interval"]
    page = report_html(run)
    assert "no interval" in page
    assert NOTHING in page


def test_a_search_against_a_silent_model_says_so(app):
    run = make_run()
    run.write_status(replace(run.status(), dense_warnings=(NOTHING,)))
    for page in ("search", "overview"):
        assert NOTHING in [warning.value for warning in app(page).warning]


def test_a_model_has_one_name_in_every_look(app):
    """Answers about an allocation manually are labelled alike: each goes by the number of its trial."""
    bodies = [{**answer, "trial": number, "label": MANUAL} for number in (5, 6) for answer in (tokens_answer(), speed_answer())]
    assert [strip.name for strip in strips(bodies)] == ["Trial 6", "Trial 5"]
    assert [speed.name for speed in speeds(bodies)] == ["Trial 6", "Trial 5"]


def test_a_table_has_no_negative_zero():
    frame = pd.DataFrame({"extra": [-0.0004, -0.0006, 0.25, None], "kl": [-1e-9, 1.0, 2.0, 3.0]})
    columns = (Column.number("extra", "Extra", 3), Column.number("kl", "KL"))
    shown = _without_negative_zeros(Table(frame, columns, "Losses"))
    assert [f"{value:.3f}" for value in shown["extra"][:3]] == ["0.000", "-0.001", "0.250"]
    assert list(shown["kl"]) == list(frame["kl"])
    nothing = pd.DataFrame({"extra": pd.Series([None, None], dtype=object)})
    assert list(_without_negative_zeros(Table(nothing, columns, "Losses"))["extra"]) == [None, None]

"""The Sensitivity page in every state, and what its buttons leave for the worker."""

from __future__ import annotations

import pytest
from synthetic import make_run, matrices, running_status, write_sensitivity
from test_pages import charts, sound, words

from lowrank_core.config.options import options_of
from lowrank_core.runs import client, read_json, write_json
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.sensitivity.records import read_records


@pytest.fixture
def dead(monkeypatch):
    """No worker comes up."""
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: None)


def test_before_anything_is_measured_the_form_says_what_it_takes(app, dead):
    run = make_run()
    test = app("sensitivity")
    assert sound(test)
    assert not charts(test)
    assert "Nothing measured yet" in words(test)
    assert "140** cells, each on 4 windows" in words(test)
    assert "going by the trials of this run" in words(test)
    test.number_input(key="sensitivity_windows_24").set_value(3)
    test.button(key="start_sensitivity").click().run()
    assert sound(test)
    (request,) = client.pending_requests(run)
    assert request["kind"] == "sensitivity"
    assert (request["arguments"]["windows"], request["arguments"]["basis"]) == (3, "pooled_feature")
    assert "is queued" in words(test)
    assert test.button(key="start_sensitivity").disabled


def test_everything_is_drawn_and_follows_the_module(app):
    run = make_run()
    write_sensitivity(run)
    test = app("sensitivity", run=run.id, module="model.layers.2.mlp.up_proj")
    assert sound(test)
    assert len(charts(test)) == len(set(charts(test))) == 4
    assert "up by depth, each module alone" in words(test)
    assert f"{len(matrices())} of {len(matrices())} modules measured." in words(test)
    assert "Spearman's ρ" in words(test)
    assert "synthetic text" in words(test)
    test.selectbox(key="module_picker").set_value("model.layers.0.self_attn.q_proj").run()
    assert "q by depth, each module alone" in words(test)
    test.selectbox(key="sensitivity_estimate").set_value("predicted").run()
    assert "prediction and measurement are equal" in words(test)
    assert "nan" not in words(test).lower().split()


def test_gaps_are_told_while_cells_come_in(app):
    run = make_run(state="running")
    run.write_status(running_status("Measuring sensitivity", 9, 140))
    request = client.submit(run, "sensitivity", launch=False, kept=[0.5])
    write_sensitivity(run, cells=9)
    test = app("sensitivity")
    assert sound(test)
    assert f"2 of {len(matrices())} modules measured." in words(test)
    assert "few modules" in words(test) or "–" in words(test)
    test.button(key="stop_sensitivity").click().run()
    assert read_json(client.result_path(run, request)) is None
    assert not client.pending_requests(run)
    assert len(read_records(run)[0].cells) == 9


def test_only_types_are_enough_for_a_picture(app):
    write_sensitivity(make_run(), cells=3)
    test = app("sensitivity")
    assert sound(test)
    assert len(charts(test)) == 2


def test_while_trials_run_the_page_says_that_they_go_first(app):
    run = make_run(state="running")
    client.submit(run, "sensitivity", launch=False)
    assert "is queued. Now: Searching" in words(app("sensitivity"))


def test_a_failure_is_told_here_and_not_on_the_compare_page(app):
    run = make_run()
    body = {"ok": False, "error": "no module type 'x'.", "kind": "sensitivity", "arguments": {}, "time": 1.0}
    write_json(run.path / "results" / "9.json", body)
    assert [error.value for error in app("sensitivity").error] == [
        "The last measurement ended: no module type 'x'. Finished cells are kept."
    ]
    assert not app("compare").error


def test_a_choice_of_nothing_is_refused_in_words(app):
    make_run()
    test = app("sensitivity")
    test.pills(key="sensitivity_ratios").set_value([]).run()
    assert [error.value for error in test.error] == ["give at least one kept ratio, such as 0.5."]
    assert test.button(key="start_sensitivity").disabled


def test_a_damaged_record_becomes_a_message(app):
    run = make_run()
    write_sensitivity(run, cells=1)
    (path,) = (run.path / "sensitivity").iterdir()
    path.write_text("{\n")
    test = app("sensitivity")
    assert not test.exception
    assert all("Delete the file to measure again" in error.value for error in test.error)
    assert test.error


@pytest.mark.parametrize("measured", [False, True])
def test_a_recorded_run_shows_what_it_has_and_measures_nothing(app, tmp_path, monkeypatch, measured):
    run = make_run(path=tmp_path / "recorded-run")
    if measured:
        write_sensitivity(run)
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("sensitivity")
    assert sound(test)
    assert test.button(key="start_sensitivity").disabled
    assert "start a calibration or a search of your own" in test.button(key="start_sensitivity").help
    assert bool(charts(test)) == measured
    assert ("This recorded run has no sensitivities" in words(test)) != measured


def test_several_settings_are_chosen_between(app):
    run = make_run()
    write_sensitivity(run, windows=2)
    write_sensitivity(run, windows=4)
    test = app("sensitivity")
    assert sound(test)
    picker = test.selectbox(key="sensitivity_setting")
    assert sorted(picker.options) == [f"Two-sided (K-FAC), factored prices, {windows} windows" for windows in (2, 4)]


def test_labels_and_helps_of_the_form_are_those_of_the_options(app, dead):
    make_run()
    test = app("sensitivity")
    drawn = {
        "kept": test.pills(key="sensitivity_ratios"),
        "scopes": test.pills(key="sensitivity_scopes"),
        "windows": test.number_input(key="sensitivity_windows_24"),
        "kinds": test.multiselect(key="sensitivity_kinds"),
        "basis": next(box for box in test.selectbox if box.key.startswith("sensitivity_basis")),
        "storage": next(box for box in test.selectbox if box.key.startswith("sensitivity_storage")),
    }
    for declared in options_of(SensitivityConfig):
        widget = drawn.pop(declared.name)
        assert (widget.label, widget.help.lower().rstrip(".")) == (declared.label, declared.option.help.lower())
    assert not drawn

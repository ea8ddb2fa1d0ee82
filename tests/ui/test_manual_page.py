"""The page Manual allocation as a user meets it: beginnings, sliders, fits, steps, files, the draft that survives, and measuring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic import RATIO, make_run, priced_units, running_status, write_front, write_rich_study
from test_pages import charts, sound, words
from test_views_manual import record_of

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.allocation.curves import CURVES_FILE, save_curves
from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.parameters import budget_for_ratio
from lowrank_core.runs import Run, write_json
from lowrank_core.runs.client import pending_requests, submit
from lowrank_core.studies.records import read_trials

SEARCH = SearchConfig(RATIO, trials=12, compression=CompressionConfig(value_dense=False))


def with_curves(run: Run, estimate: str = "kl") -> Run:
    save_curves(run.path / CURVES_FILE, record_of(priced_units(), estimate), priced_units())
    return run


@pytest.fixture
def run() -> Run:
    return with_curves(make_run(state="running", config=SEARCH, study=write_rich_study))


def draft_on_disk(run: Run) -> dict[str, object]:
    """Return the draft that was saved last."""
    newest = max((run.path / "drafts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())["draft"]


def press(test, key: str):
    return test.button(key=key).click().run()


def slider(test, run: Run, group: str):
    """Return the slider as it is drawn now: of its own each time that what it shows was changed elsewhere."""
    return next(result for result in test.slider if result.key.startswith(f"hand_slide_{group}_{run.id}"))


def slide(test, run: Run, group: str, kept: int):
    return slider(test, run, group).set_value(kept).run()


def meter(test) -> str:
    """Return the words next to the bar of the budget."""
    return next(bar.proto.text for bar in test.get("progress") if "parameters" in bar.proto.text)


# states of the page


def test_the_best_trial_is_on_the_bench(app, run):
    test = app("manual")
    assert sound(test)
    shown = words(test)
    assert "Started from **Trial 3**" in shown
    assert "Measured as Manual (trial 5)" in shown  # the newest with these ranks
    assert "Predicted KL" in shown
    assert "Measured KL 0.3500;" in shown
    assert "xpect about" not in shown
    assert "times the predicted one" in shown
    assert len(charts(test)) == 2
    assert any("lowrank compress" in code.value for code in test.code)
    assert any("lowrank enqueue" in code.value for code in test.code)


def test_the_chosen_trial_is_the_beginning(app, run):
    assert "Started from **LoRD, fixed ratios (trial 1)**" in words(app("manual", trial="1"))


def test_what_to_expect_of_a_draft_is_told_until_it_is_measured(app, run):
    test = app("manual")
    slide(test, run, "type-q", 60)
    assert "is no measurement. Expect about" in words(test)
    assert "measured trials of this run" in words(test)
    (caption,) = [result for result in test.caption if "Expect about" in result.value]
    assert "probability of 90 %" in caption.proto.help
    assert "windows of 32 tokens" in caption.proto.help
    slide(test, run, "type-q", 1)
    assert "**Extrapolated**" in words(test)
    upload(test, run, json.dumps({"ranks": dict(read_trials(run)[6].ranks), "locked": []}).encode())
    assert f"Measured KL {read_trials(run)[6].kl:.4f}" in words(test)
    assert "xpect" not in next(result.value for result in test.caption if result.value.startswith("Measured KL"))
    assert "Expect about" not in words(test)


def test_before_any_trial_is_measured_the_page_says_why_nothing_is_expected(app):
    with_curves(make_run(config=SEARCH, study=lambda run: None)).write_status(running_status("Measuring the dense model"))
    test = app("manual")
    assert sound(test)
    assert "No trial of this run is measured so far" in words(test)
    assert "Expect about" not in words(test)


def test_without_curves_nothing_is_predicted_and_the_worker_is_asked_for_them(app):
    run = make_run(config=SEARCH, study=write_rich_study)
    test = app("manual")
    assert sound(test)
    assert "This run has no error curves" in words(test)
    assert "Predicted KL –" in words(test)
    assert "Accuracy of the prediction" not in words(test)
    press(test, "hand_curves")
    assert [request["kind"] for request in pending_requests(run)] == ["curves"]
    assert test.button(key="hand_curves").disabled


def test_errors_in_units_of_their_own_predict_nothing(app):
    with_curves(make_run(config=SEARCH, study=write_rich_study), "own")
    test = app("manual")
    assert sound(test)
    assert "can't be added up" in words(test)
    assert "Predicted KL –" in words(test)


def test_a_damaged_file_of_curves_is_told(app, run):
    (run.path / CURVES_FILE).write_bytes(b"broken")
    test = app("manual")
    assert not test.exception
    assert "start the run's worker" in test.error[0].value


def test_a_search_that_has_only_begun_starts_from_uniform_ranks(app):
    run = make_run(config=SEARCH, study=lambda run: None)
    run.write_status(running_status("Factorising"))
    test = app("manual")
    assert sound(test)
    assert "Started from **Uniform**" in words(test)


def test_before_the_model_is_read_the_page_waits(app):
    make_run(parts=False, state="running")
    test = app("manual")
    assert sound(test)
    assert "The worker is reading the model" in words(test)


def test_a_range_of_ratios_can_be_picked_for(app):
    make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=9), study=write_front)
    test = app("manual")
    assert sound(test)
    assert "never counts" not in words(test)


def test_a_recorded_run_can_be_edited_but_not_measured(app, run, monkeypatch, home):
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("manual", run=run.id)
    slide(test, run, "type-q", 20)
    assert sound(test)
    assert test.button(key="measure_hand").disabled
    assert "start a search of your own to measure" in words(test)
    assert not (run.path / "drafts").exists()
    assert len(list((home / "drafts" / run.id).glob("*.json"))) == 1


# editing


def test_a_slider_moves_its_type_the_meter_follows_and_undo_takes_it_back(app, run):
    test = app("manual")
    before = meter(test)
    slide(test, run, "type-gate", 20)
    assert sound(test)
    assert meter(test) != before
    assert slider(test, run, "type-gate").value == 20  # what was asked for, and not what whole ranks came to
    assert "This draft is not measured yet" in words(test)
    press(test, "hand_undo")
    assert meter(test) == before
    press(test, "hand_redo")
    assert meter(test) != before
    press(test, "hand_reset")
    assert meter(test) == before


def test_locked_rows_stay_and_the_rest_is_fitted_to_the_budget(app, run):
    test = app("manual")
    press(test, "hand_lock")
    assert slider(test, run, "type-gate").disabled
    press(test, "hand_fit")
    assert "every row is locked" in test.error[0].value
    press(test, "hand_unlock")
    assert not test.error
    slide(test, run, "depth-0", 10)
    press(test, "hand_fit")
    assert "The budget is met" in meter(test)
    kept = allocation_from_ranks("", priced_units(), draft_on_disk(run)["ranks"]).parameters
    assert kept <= budget_for_ratio(priced_units(), RATIO)


def test_another_budget_is_met_by_a_rule(app, run):
    test = app("manual")
    test.number_input(key=f"hand_ratio_{run.id}").set_value(50.0).run()
    test.selectbox(key=f"hand_rule_{run.id}").set_value("lagrangian").run()
    press(test, "hand_fit")
    assert sound(test)
    assert "The budget is met" in meter(test)
    assert "Removed, linears 50." in words(test)


def test_a_budget_that_can_not_be_met_is_told_and_nothing_moves(app, run):
    test = app("manual")
    before = meter(test).split(" of ")[0]
    test.number_input(key=f"hand_ratio_{run.id}").set_value(99.0).run()
    press(test, "hand_fit")
    assert "can't be met" in test.error[0].value
    assert before.removeprefix("Keeps ") in meter(test)


def test_a_draft_begins_anew_from_a_rule_or_a_trial(app, run):
    test = app("manual")
    start = test.selectbox(key=f"hand_start_{run.id}")
    start.set_value("energy").run()
    press(test, "hand_begin")
    assert sound(test)
    assert "Started from **Equal energy at 30 % removed**" in words(test)
    test.selectbox(key=f"hand_start_{run.id}").set_value(6).run()
    press(test, "hand_begin")
    assert "Started from **Manual (trial 6)**" in words(test)
    assert "never counts as the best" in words(test)
    press(test, "hand_undo")
    assert "never counts as the best" not in words(test)


def test_the_picked_module_is_marked_and_only_groupings_that_there_are_can_be_chosen(app, run):
    test = app("manual", module="model.layers.1.mlp.up_proj")
    assert sound(test)
    assert not [box for box in test.selectbox if box.key.startswith("hand_grouping")]


# files


def upload(test, run: Run, content: bytes, name: str = "mine.json"):
    return test.file_uploader(key=f"hand_file_{run.id}").upload(name, content).run()


def test_a_file_is_taken_with_its_locks_and_can_be_undone(app, run):
    first, second = (unit.name for unit in priced_units()[:2])
    test = upload(app("manual"), run, json.dumps({"ranks": {first: 2, second: 3}, "locked": [first]}).encode())
    assert sound(test)
    assert "Started from **mine.json**" in words(test)
    draft = draft_on_disk(run)
    assert (draft["ranks"][first], draft["ranks"][second], draft["locked"]) == (2, 3, [first])
    assert "locks every row" not in words(test)
    test = upload(test, run, json.dumps({unit.name: 2 for unit in priced_units()}).encode(), "bare.json")
    assert "locks every row" in words(test)
    press(test, "hand_undo")
    press(test, "hand_undo")
    assert draft_on_disk(run)["ranks"] == dict(read_trials(run)[3].ranks)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (json.dumps({"model.layers.0.self_attn.q_proj": 9999}).encode(), "rank must be in"),
        (json.dumps({"lm_head": 3}).encode(), "no compressible layer"),
    ],
)
def test_a_bad_file_becomes_a_message(app, run, content, said):
    test = upload(app("manual"), run, content)
    assert not test.exception
    assert said in test.error[0].value
    assert "Started from **Trial 3**" in words(test)


# the draft survives


def test_a_draft_survives_other_pages_and_a_reload(app, run):
    test = app("manual")
    slide(test, run, "type-q", 20)
    changed = meter(test)
    test.switch_page("pages/spectra.py").run()
    test.switch_page("pages/manual.py").run()
    assert meter(test) == changed
    token = test.query_params["draft"]
    reloaded = app("manual", run=run.id, draft=token)
    assert sound(reloaded)
    assert meter(reloaded) == changed
    press(reloaded, "hand_reset")
    assert meter(reloaded) != changed


def test_who_opens_anothers_draft_writes_one_of_their_own(app, run):
    mine = app("manual")
    slide(mine, run, "type-q", 20)
    token, changed = mine.query_params["draft"], meter(mine)
    yours = app("manual", run=run.id, draft=token)
    slide(yours, run, "type-q", 60)
    assert yours.query_params["draft"] != token
    assert len(list((run.path / "drafts").glob("*.json"))) == 2
    assert meter(app("manual", run=run.id, draft=token)) == changed


@pytest.mark.parametrize("token", ["0123456789ab", "../../run"])
def test_a_draft_that_is_gone_becomes_a_note(app, run, token):
    test = app("manual", run=run.id, draft=token)
    assert sound(test)
    assert any("draft of ranks that no longer exists" in info.value for info in test.info)
    assert "Started from **Trial 3**" in words(test)


def test_a_draft_of_another_model_is_told(app, run):
    path: Path = run.path / "drafts" / "0123456789ab.json"
    write_json(path, {"draft": {"ranks": {"lm_head": 3}, "locked": []}, "start": {"ranks": {}, "locked": []}})
    test = app("manual", run=run.id, draft="0123456789ab")
    assert not test.exception
    assert "no compressible layer" in test.error[0].value


def test_choosing_another_run_forgets_the_draft(app, run):
    other = make_run(config=SEARCH, study=write_rich_study)
    test = app("manual", run=run.id)
    slide(test, run, "type-q", 20)
    test.selectbox(key="run_picker").set_value(other.id).run()
    assert "draft" not in test.query_params
    test.selectbox(key="run_picker").set_value(run.id).run()
    assert "draft" in test.query_params


# measuring


def test_a_draft_is_asked_for_and_waits(app, run):
    test = app("manual")
    assert test.button(key="measure_hand").disabled  # it is trial 3
    slide(test, run, "type-q", 20)
    press(test, "measure_hand")
    assert sound(test)
    (request,) = pending_requests(run)
    assert request["kind"] == "measure"
    assert request["arguments"] == {"ranks": draft_on_disk(run)["ranks"], "complete": None}
    assert "Waits for the worker, which checks between two trials" in words(test)
    assert test.button(key="measure_hand").disabled


def test_what_the_worker_refused_is_told(app, run):
    test = app("manual")
    slide(test, run, "type-q", 20)
    answer = {"ok": False, "kind": "measure", "error": "no space", "arguments": {"ranks": draft_on_disk(run)["ranks"]}, "time": 1.0}
    write_json(run.path / "results" / "1-a.json", answer)
    test.run()
    assert "The worker refused this draft: no space" in words(test)


def test_a_measured_draft_stands_beside_the_best_and_leads_to_its_trial(app, run):
    test = app("manual", trial="6")
    frames = [frame.value for frame in test.dataframe if "predicted" in frame.value.columns]
    assert [list(frame["name"]) for frame in frames] == [["This draft: Manual (trial 6)", "Uniform: trial 0", "Best: Trial 3"]]
    assert "windows of 32 tokens" in words(test)
    (link,) = [element.proto for element in test.get("page_link") if element.proto.label.startswith("Show Manual")]
    assert link.query_string == f"run={run.id}&pick=6"
    test.query_params.clear()
    test.query_params["trial"] = "3"  # a browser that is late still says the old one
    test.query_params["pick"] = "6"
    test.switch_page("pages/search.py").run()
    assert sound(test)
    assert test.query_params["trial"] == "6"
    assert "pick" not in test.query_params
    assert "Where Manual (trial 6) keeps its parameters" in words(test)


def test_a_link_to_a_trial_opens_in_a_session_of_its_own(app, run):
    test = app("search", run=run.id, pick="6")
    assert "Where Manual (trial 6) keeps its parameters" in words(test)
    assert test.query_params["trial"] == "6"
    assert "pick" not in test.query_params


def test_a_slider_that_shows_something_else_is_another_one_for_a_browser_that_is_late(app, run):
    test = app("manual")
    groups = ("type-q", "type-gate", "depth-0", "depth-1")
    before = {group: (slider(test, run, group).key, slider(test, run, group).value) for group in groups}
    slide(test, run, "type-gate", 20)
    for group in set(groups) - {"type-gate"}:
        key, value = before[group]
        drawn = slider(test, run, group)
        assert (drawn.key == key) == (drawn.value == value), group
    assert slider(test, run, "depth-0").key != before["depth-0"][0]


def test_a_slider_that_was_moved_stays_the_one_in_hand(app, run):
    test = app("manual")
    key = slider(test, run, "type-gate").key
    slide(test, run, "type-gate", 20)
    slide(test, run, "type-gate", 37)
    assert slider(test, run, "type-gate").key == key
    press(test, "hand_undo")
    assert slider(test, run, "type-gate").key != key


def test_a_draft_can_wait_for_a_worker_that_ended(app):
    run = make_run(config=SEARCH, study=write_rich_study)
    ranks = dict(allocation_from_ranks("", priced_units(), {priced_units()[0].name: 2}).ranks)
    submit(run, "measure", launch=False, ranks=ranks)
    test = app("manual")
    assert "One other allocation is queued" in words(test)
    upload(test, run, json.dumps({"ranks": ranks, "locked": []}).encode())
    assert any(button.key == "resume_measure" for button in test.button)


def test_the_search_page_leads_here(app, run):
    links = [element.proto.label for element in app("search").get("page_link")]
    assert any("Choose ranks manually" in label for label in links)

"""Every page in every case that a user meets: no run, a finished, a running and a failed one, a link that is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from synthetic import make_run, model_json, running_status, write_answers, write_healing

from lowrank_core.config import CompressionConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.mapping import build
from lowrank_core.metrics import METRICS
from lowrank_core.presets.recipes import PRESETS, search_by
from lowrank_core.runs import list_runs, write_json
from lowrank_core.runs.client import pending_requests

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "overview": "Overview",
    "spectra": "Spectra",
    "energy": "Feature energy",
    "sensitivity": "Sensitivity",
    "manual": "Manual allocation",
    "search": "Rank search",
    "compare": "Compare",
    "export": "Export",
}


def words(test: AppTest) -> str:
    """Everything that can be read on the page."""
    elements = [*test.markdown, *test.caption, *test.info, *test.warning, *test.error, *test.subheader, *test.title]
    return "\n".join([str(element.value) for element in elements] + [f"{metric.label} {metric.value}" for metric in test.metric])


def sound(test: AppTest) -> bool:
    return not test.exception and not test.error


def charts(test: AppTest) -> list[str]:
    return [element.proto.id for kind in ("plotly_chart", "vega_lite_chart") for element in test.get(kind)]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_without_any_run_and_says_what_to_do(app, page):
    test = app(page)
    assert sound(test)
    assert test.title[0].value == PAGES[page]
    assert not charts(test)
    assert any(
        word in words(test)
        for word in ("Start a calibration", "start a calibration", "Start a search", "Start with the bundled model", "Start a search above")
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_a_finished_run(app, page):
    run = make_run()
    write_answers(run)
    test = app(page)
    assert sound(test)
    assert "nan" not in words(test).lower().split()
    assert test.query_params["run"] == run.id


@pytest.mark.parametrize(("page", "minimum"), [("spectra", 2), ("energy", 4), ("search", 2), ("compare", 1)])
def test_charts_are_drawn_and_told_apart_by_key(app, page, minimum):
    write_answers(make_run())
    result = charts(app(page))
    assert len(result) >= minimum
    assert len(set(result)) == len(result)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_a_running_run(app, page):
    make_run(state="running")
    test = app(page)
    assert sound(test)
    assert any(button.label == "Stop" for button in test.button)


@pytest.mark.parametrize("page", ["spectra", "energy", "sensitivity"])
def test_a_page_that_waits_for_the_calibration_says_so(app, page):
    run = make_run(parts=False, state="running")
    run.write_status(running_status("Calibrating", 3, 40))
    test = app(page, run=run.id)
    assert sound(test)
    assert "Calibrating" in words(test)
    assert "3 of 40" in words(test)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_survives_a_failed_run_and_the_message_is_told(app, page):
    run = make_run(parts=False, state="failed")
    test = app(page, run=run.id)
    assert not test.exception
    assert "the loss of layer 3 is not finite" in words(test)


@pytest.mark.parametrize("page", PAGES)
def test_a_link_with_bad_values_becomes_a_note(app, page):
    run = make_run()
    test = app(page, run="no-such-run", module="no.such.module", trial="999")
    assert sound(test)
    notes = " ".join(info.value for info in test.info)
    assert "no-such-run" in notes
    assert "no.such.module" in notes
    assert "999" in notes
    assert test.query_params["run"] == run.id


@pytest.mark.parametrize("trial", ["-1", "1.5", "../../etc", "9" * 400, "²"])
def test_a_trial_that_is_no_number_becomes_a_note(app, trial):
    make_run()
    test = app("search", trial=trial)
    assert sound(test)
    assert any("trial" in info.value for info in test.info)


@pytest.mark.parametrize("run", ["..", "../runs", "a/b", "%2e%2e", " "])
def test_a_run_that_is_a_path_is_not_opened(app, run):
    make_run()
    test = app("overview", run=run)
    assert sound(test)
    assert any("run" in info.value for info in test.info)


def test_a_link_restores_run_module_and_trial(app):
    older = make_run()
    make_run(search=False)
    module = "model.layers.1.mlp.up_proj"
    test = app("spectra", run=older.id, module=module, trial="2")
    assert test.selectbox(key="run_picker").value == older.id
    assert test.selectbox(key="module_picker").value == module
    search = app("search", run=older.id, trial="2")
    assert "Where Trial 2 keeps its parameters" in words(search)


def test_the_chosen_module_follows_to_the_next_page_and_into_the_address(app):
    make_run()
    test = app("spectra")
    module = "model.layers.2.self_attn.o_proj"
    test.selectbox(key="module_picker").set_value(module).run()
    assert test.query_params["module"] == module
    test.switch_page("pages/energy.py").run()
    assert test.selectbox(key="module_picker").value == module


def test_all_pages_can_be_visited_one_after_another(app):
    run = make_run()
    write_answers(run)
    test = app("overview")
    for page, title in [*PAGES.items(), ("overview", "Overview")]:
        test.switch_page(f"pages/{page}.py").run()
        assert sound(test)
        assert test.title[0].value == title
        assert test.query_params["run"] == run.id


def test_choosing_another_run_forgets_the_trial(app):
    older = make_run()
    make_run()
    test = app("search", trial="2")
    assert test.query_params["trial"] == "2"
    test.selectbox(key="run_picker").set_value(older.id).run()
    assert test.query_params["run"] == older.id
    assert "trial" not in test.query_params


def test_the_slider_of_the_rank_changes_the_sentence(app):
    make_run()
    test = app("energy")
    slider = next(slider for slider in test.slider if slider.label == "Rank")
    slider.set_value(3).run()
    assert "At rank 3 (" in words(test)


def test_the_search_page_counts_trials_and_names_the_best(app):
    make_run()
    shown = words(app("search"))
    assert "5 of 6 trials complete" in shown
    assert "Best trial Trial 3" in shown
    assert "Where Trial 3 keeps its parameters" in shown


def test_compare_shows_both_perplexities_and_the_protocol(app):
    run = make_run()
    write_answers(run)
    shown = words(app("compare"))
    assert "Perplexity, dense 20.09" in shown
    assert "Perplexity, compressed 24.53" in shown
    assert "python-stdlib, test split, 4 windows of 32 tokens" in shown
    assert "30.0 % removed" in shown


def test_a_healed_model_stands_beside_the_one_shot_one(app):
    run = make_run()
    write_healing(run)
    test = app("compare")
    assert sound(test)
    table = next(frame.value for frame in test.dataframe if "form" in frame.value)
    assert list(table["form"]) == ["dense", "healed", "one-shot"]
    assert list(table["allocation"]) == ["Dense", "Trial 3, healed by distill", "Trial 3"]
    shown = words(test)
    assert "40 steps" in shown
    assert "the state after step 20 was kept" in shown
    assert "17 %" in shown or "16.7 %" in shown


def test_a_healing_that_runs_shows_how_far_it_is(app):
    run = make_run()
    write_healing(run, done=False)
    test = app("compare")
    assert sound(test)
    assert "validated up to step 20 of 40" in words(test)


def test_healing_is_asked_for_with_its_settings(app, monkeypatch):
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: None)
    run = make_run()
    test = app("compare", run=run.id)
    test.number_input(key="heal_steps").set_value(50)
    test.selectbox(key="heal_method").set_value("diagonal")
    test.button(key="heal").click().run()
    assert sound(test)
    (request,) = pending_requests(run)
    assert request["kind"] == "heal"
    healing = build(HealingConfig, request["arguments"]["healing"], "the request")
    assert healing == HealingConfig(method="diagonal", steps=50, cross_entropy=0.02)


def test_an_answer_that_failed_is_told(app):
    run = make_run()
    write_json(
        run.path / "results" / "9.json",
        {"ok": False, "error": "trial 9 of this run is not complete", "kind": "compare", "arguments": {}, "time": 1.0},
    )
    test = app("compare")
    assert [error.value for error in test.error] == ["The last request (compare) failed: trial 9 of this run is not complete"]


@pytest.mark.parametrize("damage", ["model.json", "calibration.json", "spectra.npz"])
def test_a_damaged_file_becomes_a_message(app, damage):
    run = make_run()
    (run.path / damage).write_text("{")
    page = "spectra" if damage == "spectra.npz" else "overview"
    test = app(page, run=run.id)
    assert not test.exception
    assert damage in test.error[0].value


def test_starting_a_calibration_makes_and_selects_a_run(app):
    test = app("overview")
    test.number_input(key="calibration_windows").set_value(64)
    test.button(key="start_calibration").click().run()
    assert sound(test)
    (run,) = list_runs()
    assert run.status().state == "queued"
    assert run.config.search is None
    assert run.config.text.calibration_windows == 64
    assert test.query_params["run"] == run.id


def test_starting_a_search_takes_over_what_the_run_on_screen_had(app):
    base = make_run(search=False)
    test = app("search")
    test.slider(key="search_ratio").set_value(40)
    test.selectbox(key="search_objective").set_value("perplexity")
    test.button(key="start_search").click().run()
    assert sound(test)
    run = next(run for run in list_runs() if run.id != base.id)
    assert run.config.text == base.config.text
    assert run.config.search.compression_ratio == 0.4
    assert run.config.search.objective == "perplexity"


def test_every_basis_of_the_registry_can_be_searched_with_and_storage_chosen(app):
    base = make_run(search=False)
    test = app("search")
    test.segmented_control(key="search_recipe").set_value("own").run()
    assert test.selectbox(key="search_basis").options == [basis.label for basis in METRICS.values()]
    test.selectbox(key="search_basis").set_value("two_sided")
    test.selectbox(key="search_storage").set_value("pivoted")
    test.toggle(key="search_value_dense").set_value(False)
    test.button(key="start_search").click().run()
    assert sound(test)
    run = next(run for run in list_runs() if run.id != base.id)
    assert run.config.search.compression == CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False)


def test_a_search_as_published_overrides_the_choices_around_it(app):
    base = make_run(search=False)
    test = app("search")
    test.slider(key="search_trials").set_value(40)
    test.segmented_control(key="search_recipe").set_value("bolaco").run()
    captions = " ".join(caption.value for caption in test.caption)
    assert "only points that keep at most this, and at most a tenth of all less, are drawn" in captions
    assert "100 search-validation windows of 32 tokens (3,200 tokens), selected before the first trial from up to 820, in" in captions
    test.button(key="start_search").click().run()
    assert sound(test)
    search = next(run for run in list_runs() if run.id != base.id).config.search
    assert search == replace(search_by(PRESETS["bolaco"], search.compression_ratio), trials=40)


@pytest.mark.parametrize(
    ("typed", "said"),
    [("/no/such/folder", "There is no folder /no/such/folder"), ("a b c", "neither a folder nor a hub id"), ("/", "holds no config.json")],
)
def test_a_model_that_is_not_there_is_refused_with_a_reason(app, typed, said):
    test = app("overview")
    test.segmented_control(key="model_choice").set_value("other").run()
    test.text_input(key="model_reference").set_value(typed)
    test.button(key="start_calibration").click().run()
    assert not test.exception
    assert said in test.error[0].value
    assert not list_runs()


def test_a_file_that_is_not_there_is_refused_with_a_reason(app, tmp_path):
    test = app("overview")
    test.selectbox(key="text_choice").set_value("file").run()
    test.text_input(key="text_path").set_value(str(tmp_path / "no.txt"))
    test.button(key="start_calibration").click().run()
    assert "There is no file" in " ".join(error.value for error in test.error)
    assert not list_runs()


def test_the_search_form_says_what_a_trial_is_judged_on(app):
    texts = " ".join(caption.value for caption in app("search").caption)
    assert "24 search-validation windows of 256 tokens (6,144 tokens), in the space 5x1" in texts
    assert "256 calibration windows" in texts


def test_a_ratio_that_can_not_be_met_is_refused_before_anything_starts(app):
    run = make_run(search=False)
    model = model_json()
    write_json(run.path / "model.json", {**model, "layers": [layer for layer in model["layers"] if layer["kind"] in ("q_proj", "v_proj")]})
    test = app("search")
    test.segmented_control(key="search_recipe").set_value("bolaco").run()
    test.slider(key="search_ratio").set_value(80)
    test.button(key="start_search").click().run()
    assert "can't be met" in test.error[0].value
    assert len(list_runs()) == 1


def test_stop_leaves_the_request_that_the_worker_reads(app):
    run = make_run(state="running")
    test = app("search")
    test.button(key="stop_run").click().run()
    assert run.pause_marker.exists()
    assert "stopping" in " ".join(str(element.value) for element in test.sidebar.markdown)


def test_measuring_leaves_a_request_for_the_best_trial_and_each_baseline(app, monkeypatch):
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: None)  # as if it had died at once
    run = make_run()
    test = app("compare")
    test.button(key="measure").click().run()
    assert sound(test)
    asked = [(request["kind"], request["arguments"]) for request in pending_requests(run)]
    assert asked == [("compare", {"trial": trial}) for trial in (3, "uniform", "lord_manual", "lagrangian")]
    assert "are queued" in words(test)


def test_a_prompt_is_asked_for_with_everything_that_decides_the_text(app):
    run = make_run()
    test = app("compare", run=run.id)
    test.segmented_control(key="compare_look").set_value("prompt").run()
    test.multiselect[0].set_value([3]).run()
    test.number_input(key="prompt_temperature").set_value(0.7)
    test.number_input(key="prompt_seed").set_value(3)
    test.button(key="continue").click().run()
    (request,) = pending_requests(run)
    assert request["kind"] == "generate"
    asked = {name: request["arguments"][name] for name in ("tokens", "temperature", "seed")}
    assert asked == {"tokens": 64, "temperature": 0.7, "seed": 3}


def test_a_recorded_run_is_marked_and_can_not_be_continued(app, tmp_path, monkeypatch):
    run = make_run(path=tmp_path / "recorded-run")
    record = run.record
    write_json(run.path / "run.json", {**record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("compare")
    assert sound(test)
    assert "Recorded run, shipped with the package" in words(test)
    assert test.button(key="measure").disabled
    assert not any(button.label in ("Stop", "Resume") for button in test.button)


def test_a_page_that_is_opened_by_its_address_first_gets_its_frame():
    run = make_run()
    test = AppTest.from_file(str(ROOT / "app.py"), default_timeout=300)
    test.run()
    test.switch_page("pages/spectra.py").run()
    assert sound(test)
    assert test.selectbox(key="run_picker").value == run.id


@pytest.mark.process
def test_the_dashboard_imports_neither_torch_nor_transformers():
    code = (
        "import sys, pkgutil, importlib, pages.components, lowrank_core.studio\n"
        "for package in (pages.components, lowrank_core.studio):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"

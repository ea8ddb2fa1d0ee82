"""The Overview as a user meets it: before a run starts, and what can be done with runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from synthetic import make_run, write_answers
from test_pages import sound, words
from test_views_model import checkpoint

from lowrank_core.config import to_mapping
from lowrank_core.runs import list_runs, write_json
from lowrank_core.runs.manage import notes_of
from lowrank_core.studio.report import report_html


def tree_of(test) -> str:
    return " ".join(str(html.proto.body) for html in test.get("html"))


def other_model(test, reference: str):
    test.segmented_control(key="model_choice").set_value("other").run()
    return test.text_input(key="model_reference").set_value(reference).run()


def test_the_bundled_model_is_shown_before_anything_is_loaded(app):
    test = app("overview")
    assert sound(test)
    assert "model.embed_tokens.weight" in tree_of(test)
    assert "not compressed: embedding, and the head too: tied" in tree_of(test)
    assert "84.6 % of them compressible" in words(test)
    assert "of memory (" in words(test)
    tables = [frame.value for frame in test.dataframe]
    (fit,) = [table.value for table in test.table]
    assert "Sum of memory" in list(fit["What"])
    assert any("characters" in table for table in tables)
    test.segmented_control(key="start_tree_by").set_value("type").run()
    assert "mlp.down_proj.weight" in tree_of(test)


def test_a_local_folder_is_shown(app, tmp_path):
    test = other_model(app("overview"), str(checkpoint(tmp_path / "model")))
    assert sound(test)
    assert "Block 2" in tree_of(test)
    assert "Block 3" not in tree_of(test)


def test_a_folder_with_several_sets_of_weights_is_told_which_is_shown(app, tmp_path):
    """One file of three blocks next to shards of one block: transformers loads the file, and that is what is drawn."""
    folder, shard = checkpoint(tmp_path / "model"), "model-00001-of-00001.safetensors"
    with safe_open(folder / "model.safetensors", framework="numpy") as archive:
        save_file({name: archive.get_tensor(name) for name in archive.keys() if ".2." not in name}, folder / shard)  # noqa: SIM118
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    test = other_model(app("overview"), str(folder))
    assert sound(test)
    assert "Block 2" in tree_of(test)
    (reported,) = [note.value for note in test.info if "several sets" in note.value]
    assert "transformers loads model.safetensors; not loaded: model-*-of-00001.safetensors" in reported


def test_the_note_stands_beside_a_run_too(app, tmp_path):
    folder = checkpoint(tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    run = make_run()
    elsewhere = replace(run.config, model=replace(run.config.model, reference=str(folder)))
    write_json(run.path / "run.json", {**run.record, "config": to_mapping(elsewhere)})
    test = app("overview", run=run.id)
    assert sound(test)
    assert any("not loaded: consolidated.safetensors" in note.value for note in test.info)


def test_a_hub_id_that_is_not_here_says_what_will_be_downloaded(app, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_core.studio.overview.source_checks.constants.HF_HUB_CACHE", str(tmp_path))
    test = other_model(app("overview"), "owner/name")
    assert sound(test)
    (info,) = [info.value for info in test.info if "owner/name" in info.value]
    assert "downloaded from huggingface.co" in info
    assert str(tmp_path) in info
    test.button(key="start_calibration").click().run()
    assert list_runs()[0].config.model.reference == "owner/name"


def test_a_model_that_will_not_fit_is_told(app, monkeypatch):
    from lowrank_core.studio.overview import memory_estimate as fit

    monkeypatch.setattr("pages.components.overview.preflight.this_machine", lambda: fit.Machine(1, 2**40, None))
    test = app("overview")
    assert any("Does not fit: too little memory" in warning.value for warning in test.warning)


def test_a_file_is_previewed_and_a_bad_one_refused(app, tmp_path):
    good, bad = tmp_path / "a.txt", tmp_path / "b.jsonl"
    good.write_text("first words of a text\n" * 2000)
    bad.write_text('{"body": 1}\n')
    test = app("overview")
    test.selectbox(key="text_choice").set_value("file").run()
    test.text_input(key="text_path").set_value(str(good)).run()
    assert sound(test)
    assert any("first words of a text" in code.value for code in test.code)
    test.text_input(key="text_path").set_value(str(bad))
    test.button(key="start_calibration").click().run()
    assert "each line of" in test.error[0].value
    assert not list_runs()


def test_the_dtype_reaches_the_run(app):
    test = app("overview")
    test.selectbox(key="model_dtype").set_value("bfloat16")
    test.button(key="start_calibration").click().run()
    assert list_runs()[0].config.model.dtype == "bfloat16"


# runs


def test_a_run_is_renamed_and_noted_and_both_are_on_every_page(app):
    run = make_run()
    test = app("overview")
    test.text_input(key=f"rename_{run.id}").set_value("My best try")
    test.button(key="rename").click().run()
    test.text_area(key=f"notes_{run.id}").set_value("Needs more windows ![x](https://example.org/a.png)")
    test.button(key="save_notes").click().run()
    assert sound(test)
    assert notes_of(run) == "Needs more windows ![x](https://example.org/a.png)"
    test.switch_page("pages/search.py").run()
    aside = " ".join(str(caption.value) for caption in test.sidebar.caption)
    assert "My best try" in aside
    assert r"Needs more windows \!\[x\]\(https" in aside  # text: a browser fetches nothing for it


def test_deleting_asks_first_and_says_what_will_be_gone(app):
    run = make_run()
    (run.path / "exports" / "trial-3").mkdir(parents=True)
    test = app("overview")
    test.button(key="delete_run").click().run()
    assert sound(test)
    assert str(run.path) in words(test)
    assert "with its exported models (trial-3)" in words(test)
    assert test.button(key="delete_confirm")
    test.button(key="delete_keep").click().run()
    assert "delete_confirm" not in {button.key for button in test.button}
    assert run.path.exists()


def test_a_run_whose_worker_lives_can_not_be_deleted(app):
    run = make_run(state="running")
    test = app("overview")
    test.button(key="delete_run").click().run()
    assert "a worker holds this run" in test.error[0].value
    assert "delete_confirm" not in {button.key for button in test.button}
    assert run.path.exists()


def test_a_recorded_run_can_not_be_changed(app, tmp_path, monkeypatch):
    run = make_run(path=tmp_path / "recorded-run")
    write_json(run.path / "run.json", {**run.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: run)
    test = app("overview")
    assert sound(test)
    assert test.button(key="delete_run").disabled


def test_damaged_notes_become_a_message(app):
    run = make_run()
    (run.path / "notes.json").write_text("{")
    test = app("overview")
    assert not test.exception
    assert "notes.json" in test.error[0].value


@pytest.fixture
def pick(monkeypatch):
    """AppTest can't pick rows: the table says that these are picked."""

    def picked(*rows: int) -> None:
        monkeypatch.setattr("pages.components.state.picked_rows", lambda key, values: [values[row] for row in rows])

    return picked


def test_picked_runs_stand_side_by_side(app, pick):
    for run in (make_run(), make_run()):
        write_answers(run)
    make_run()
    pick(1, 2)
    test = app("overview")
    assert sound(test)
    (table,) = [frame.value for frame in test.dataframe if "value_group" in frame.value]
    assert list(table["perplexity"]) == pytest.approx([24.53, 24.53], abs=0.01)
    assert "one protocol for all" in words(test)
    assert test.button(key="delete_run").label == "Delete these 2 runs"


def test_columns_that_tell_runs_apart_are_shown_only_where_they_differ(app, pick):
    one, two = make_run(), make_run()
    for run in (one, two):
        write_answers(run)
    pick(0, 1)

    def columns() -> str:
        (table,) = [frame for frame in app("overview").dataframe if "value_group" in frame.value]
        return " ".join(table.proto.column_order)

    assert "test_group" not in columns()
    text = json.loads((two.path / "text.json").read_text())
    text["splits"]["test"]["sha256"] = "other"
    write_json(two.path / "text.json", text)
    assert "test_group" in columns()


def test_a_text_shorter_than_a_window_starts_nothing(app, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words\nand a few more\n")
    test = app("overview")
    test.selectbox(key="text_choice").set_value("file").run()
    test.text_input(key="text_path").set_value(str(short)).run()
    test.button(key="start_calibration").click().run()
    assert any("fewer than the tokens of one window" in error.value for error in test.error)
    assert list_runs() == []


def test_the_report_has_the_cards_of_the_page(app):
    run = make_run()
    test = app(run=run.id)
    html = report_html(run)
    assert len(test.metric) == 10
    for card in test.metric:
        assert f"<dt>{card.label}</dt><dd><b>{card.value}</b>" in html, card.label

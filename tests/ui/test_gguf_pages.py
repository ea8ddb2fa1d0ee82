"""A GGUF file on every page, from the form that takes its path to the choice of an export."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gguf_files import write_gguf
from routes import NAMES
from test_pages import sound, words

from lowrank_core.config import SearchConfig
from lowrank_core.runs import create_run, list_runs
from lowrank_core.worker.main import run_worker

pytest.importorskip("gguf")


@pytest.fixture
def started(app, llama_checkpoint, text_file, tmp_path):
    """The overview after a calibration of a tiny file was started in its form, and the file."""
    path = write_gguf(llama_checkpoint, tmp_path / "tiny.Q8_0.gguf", quantization="Q8_0")
    test = app("overview")
    test.segmented_control(key="model_choice").set_value("other").run()
    test.text_input(key="model_reference").set_value(str(path)).run()
    test.selectbox(key="text_choice").set_value("file").run()
    test.text_input(key="text_path").set_value(str(text_file)).run()
    test.number_input(key="context").set_value(16)
    test.number_input(key="calibration_windows").set_value(32).run()
    return test, path


def test_the_form_tells_what_the_file_is_and_starts_a_calibration(started):
    test, path = started
    assert sound(test)
    shown = words(test)
    assert "llama (GGUF)" in shown
    assert [note.value for note in test.info if "dequantised when it is read" in note.value]
    assert not [note.value for note in test.warning if "dequantised" in note.value]
    test.button(key="start_calibration").click().run()
    assert sound(test)
    (run,) = list_runs()
    assert (run.config.model.reference, run.config.text.calibration_windows) == (str(path), 32)


@pytest.mark.slow
def test_every_page_shows_a_searched_file(started, app):
    test, path = started
    test.button(key="start_calibration").click().run()
    config = replace(list_runs()[0].config, search=SearchConfig(0.3, trials=4, confirmed=1))
    run = create_run(config)
    run_worker(run)
    for name in NAMES:
        test = app(name, run=run.id)
        assert sound(test), name
        assert str(path) in words(test) or name == "export"
    size = next(card for card in app("overview", run=run.id).metric if card.label == "Size")
    assert "As written in bfloat16; held as float32" in size.help  # larger than the file

"""What a model is made of, and what a user typed, as numbers and words."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic import (
    BLOCKS,
    FFN,
    HIDDEN,
    make_run,
    matrices,
    model_json,
)

from lowrank_core.config.mapping import build
from lowrank_core.errors import ModelError, RunError, TextError
from lowrank_core.runs import write_json
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.overview import source_checks, text_facts
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.search import history
from lowrank_core.studio.shared import formatting, model_facts, run_list


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (0, "0"),
        (0.0025504, "0.00255"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.4, "1,234"),
        (1.7e9, "1.70e9"),
    ],
)
def test_numbers_are_words_and_a_missing_one_is_a_dash(value, words):
    assert formatting.number(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(None, "–"), (math.nan, "–"), (950, "950"), (65_536, "65.5 k"), (6_850_000, "6.85 M"), (7_000_000_000, "7.00 B")]
)
def test_counts_are_shortened_in_their_own_unit(value, words):
    assert formatting.count(value) == words


@pytest.mark.parametrize(("seconds", "words"), [(None, "–"), (0.2, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_are_words(seconds, words):
    assert formatting.duration(seconds) == words


def test_fractions_and_sizes_are_words():
    assert formatting.percent(0.3) == "30.0 %"
    assert formatting.percent(math.nan) == "–"
    assert formatting.size(27_400_000) == "26.1 MiB"
    assert formatting.sizes([3 * 2**30, 2**29, None]) == ["3.00 GiB", "0.500 GiB", "–"]
    assert formatting.sizes([12, 900]) == ["12 B", "900 B"]
    assert formatting.interval(1.0, None) == "–"


def test_a_moment_of_another_year_says_which():
    now = time.localtime()
    this, last = (time.mktime((year, 1, 1, 9, 5, 0, 0, 0, -1)) for year in (now.tm_year, now.tm_year - 1))
    assert formatting.timestamp(this) == "1 Jan 09:05"
    assert formatting.timestamp(last) == f"1 Jan {now.tm_year - 1}"


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_tables_have_the_time_that_labels_have(in_tokyo: None):
    run = make_run()
    label, (created,) = formatting.timestamp(float(run.record["created"])), run_list.run_table([run])["created"]
    assert f"{created:%H:%M}" == label.rpartition(" ")[2]
    trial = next(trial for trial in read_trials(run) if trial.started is not None)
    started = history.trials_spec([trial], run.config.search).frame["started"].iloc[0]
    assert f"{started:%H:%M}" == formatting.timestamp(trial.started).rpartition(" ")[2]


# the model


def test_model_facts_count_what_the_run_holds():
    facts = model_facts.model_facts(make_run())
    assert facts.compressible_parameters == sum(m.dense_parameters for m in matrices())
    assert facts.compressible_share == pytest.approx(facts.compressible_parameters / (facts.compressible_parameters + 128 * HIDDEN))
    assert [m.name for m in facts.matrices] == [m.name for m in matrices()]


def test_the_module_table_adds_up_to_the_model():
    facts = model_facts.model_facts(make_run())
    table = model_facts.module_table(facts)
    assert table["parameters"].sum() == facts.parameters
    assert table["share"].sum() == pytest.approx(1.0)
    assert list(table["type"][:7]) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert set(table["count"][:7]) == {BLOCKS}


def test_a_record_without_a_key_is_a_message_that_names_it():
    run = make_run()
    body = model_json()
    del body["vocabulary"]
    write_json(run.path / "model.json", body)
    with pytest.raises(RunError, match=r"model\.json has no 'vocabulary'"):
        model_facts.model_facts(run)


def test_a_record_with_a_wrong_kind_of_value_is_a_message():
    with pytest.raises(RunError, match="windows: expected int, got 'many'"):
        build(text_facts.SplitFacts, {"name": "test", "windows": "many", "tokens": 1}, "text.json")


# headers of a checkpoint


def checkpoint(folder: Path) -> Path:
    tensors = {f"{m.name}.weight": np.zeros((m.d_out, m.d_in), np.float16) for m in matrices()}
    tensors |= {
        "model.embed_tokens.weight": np.zeros((128, HIDDEN), np.float16),
        "model.layers.0.input_layernorm.weight": np.zeros(HIDDEN, np.float16),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": 128, "tie_word_embeddings": True})
    )
    return folder


def test_headers_tell_what_the_worker_would_find(tmp_path):
    facts = read_model(checkpoint(tmp_path / "model")).facts
    assert [replace(matrix, input_group="") for matrix in facts.matrices] == matrices()
    assert facts.parameters == sum(m.dense_parameters for m in matrices()) + 128 * HIDDEN + HIDDEN
    assert facts.bytes == 2 * facts.parameters
    assert facts.tied_embeddings
    assert sorted(facts.input_widths.values()) == sorted([HIDDEN, HIDDEN, HIDDEN, FFN] * BLOCKS)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_a_message(tmp_path, harm, said):
    folder = checkpoint(tmp_path / "model")
    harm(folder)
    with pytest.raises(ModelError, match=said):
        source_checks.check_model(str(folder))


def test_references_are_told_apart(tmp_path):
    assert source_checks.check_model("meta-llama/Llama-2-7b-hf") is None
    assert source_checks.check_model(str(checkpoint(tmp_path / "model"))).blocks == BLOCKS
    for wrong, said in (("", "No model"), ("two words", "neither"), (str(tmp_path / "none"), "There is no folder")):
        with pytest.raises(ModelError, match=said):
            source_checks.check_model(wrong)


def test_texts_are_checked(tmp_path):
    good, empty, binary = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.bin"
    good.write_text("words")
    empty.touch()
    binary.touch()
    assert source_checks.check_text(f"file:{good}") == f"file:{good}"
    assert source_checks.check_text("c4") == "c4"
    for wrong, said in (
        ("lambada", "Unknown"),
        ("file:", "No file"),
        (f"file:{empty}", "is empty"),
        (f"file:{binary}", "not a text file"),
        ("ptb:/none", "no folder"),
    ):
        with pytest.raises(TextError, match=said):
            source_checks.check_text(wrong)

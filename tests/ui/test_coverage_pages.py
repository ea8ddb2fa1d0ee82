"""Every page that shows a ratio says what of the model can't be compressed, and what the ratio means for the whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic import HIDDEN, RATIO, comparison, make_run, matrices, model_json, write_answers, write_rich_study
from test_pages import sound, words

from lowrank_core.config import CompressionConfig, SearchConfig
from lowrank_core.coverage import Coverage
from lowrank_core.errors import RunError
from lowrank_core.runs import Run, write_json
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.report import report_html
from lowrank_core.studio.shared.model_facts import model_facts, module_table

PAGES = ("overview", "search", "manual", "compare", "export")
COMPRESSIBLE = sum(matrix.dense_parameters for matrix in matrices())
COVERAGE = Coverage.of([("linear", COMPRESSIBLE), ("experts", 30 * COMPRESSIBLE), ("router", 96), ("tied", 128 * HIDDEN), ("vector", 24)])
DROPPED = "model.layers.0.self_attn.v_proj and model.layers.0.self_attn.dt_proj are not compressed by heads: 2 layers read the value."


@pytest.fixture
def run() -> Run:
    result = make_run(config=SearchConfig(RATIO, trials=12, compression=CompressionConfig(value_dense=False)), study=write_rich_study)
    body = {**model_json(), "parameters": COVERAGE.total, "coverage": COVERAGE.to_mapping(), "heads_dropped": [DROPPED]}
    write_json(result.path / "model.json", body)
    write_answers(result)
    write_json(result.path / "results" / "10.json", comparison("trial 3", 3, 3.2))
    return result


@pytest.mark.parametrize("page", PAGES)
def test_every_page_with_a_ratio_says_what_is_left_alone(app, run, page):
    test = app(page, run=run.id)
    assert sound(test)
    assert COVERAGE.statement() in words(test)


@pytest.mark.parametrize("page", ["search", "manual", "export"])
def test_a_ratio_is_told_for_the_whole_model(app, run, page):
    assert "of the compressible linears = " in words(app(page, run=run.id))


@pytest.mark.parametrize("page", ["overview", "search", "manual"])
def test_little_to_compress_is_a_warning_before_work_is_spent(app, run, page):
    test = app(page, run=run.id)
    assert any("of the parameters outside the embeddings can be compressed" in warning.value for warning in test.warning)


def test_a_plain_decoder_is_not_warned_of(app):
    test = app("search", run=make_run().id)
    assert not any("can be compressed" in warning.value for warning in test.warning)


def test_a_pair_that_is_no_head_unit_is_named(app, run):
    assert DROPPED in words(app("overview", run=run.id))


def test_the_module_table_has_a_row_for_what_is_left_alone(run):
    facts = model_facts(run)
    assert facts is not None
    table = module_table(facts).set_index("type")
    assert table["parameters"].sum() == COVERAGE.total
    assert table.loc["other experts", "parameters"] == COVERAGE.parameters["experts"]
    assert "taken apart" in table.loc["other experts", "shape"]


def test_an_older_record_says_how_much_and_no_more(app):
    result = make_run()
    facts = model_facts(result)
    assert facts is not None
    assert set(facts.coverage.parameters) == {"linear", "unrecorded"}
    assert facts.coverage.total == facts.parameters
    for page in PAGES:
        assert sound(app(page, run=result.id))
    assert "not compressible: the rest" in words(app("overview", run=result.id))


def test_a_damaged_table_is_a_message(run):
    write_json(run.path / "model.json", {**model_json(), "coverage": [{"kind": "linear"}]})
    with pytest.raises(RunError, match="no valid coverage"):
        model_facts(run)


def test_the_report_says_it_too(run):
    page = report_html(run)
    assert "experts" in page
    assert "of the compressible linears = " in page


def test_experts_of_a_checkpoint_are_counted_before_anything_is_loaded(app, tmp_path):
    tensors = {f"{m.name}.weight": np.zeros((m.d_out, m.d_in), np.float16) for m in matrices() if "self_attn" in m.name}
    for depth in range(3):
        for expert in range(8):
            tensors |= {
                f"model.layers.{depth}.mlp.experts.{expert}.{name}_proj.weight": np.zeros((48, 24), np.float16) for name in ("up", "gate")
            }
        tensors[f"model.layers.{depth}.mlp.gate.weight"] = np.zeros((8, 24), np.float16)
    tensors["model.embed_tokens.weight"] = np.zeros((128, 24), np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 24,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = read_model(tmp_path).facts.coverage
    assert table.parameters["expert"] == 3 * 8 * 2 * 48 * 24
    assert table.parameters["router"] == 3 * 8 * 24
    test = app("overview")
    test.segmented_control(key="model_choice").set_value("other").run()
    test.text_input(key="model_reference").set_value(str(tmp_path)).run()
    assert sound(test)
    assert table.statement() in words(test)
    assert "is known once the model is loaded" in words(test)
    assert not any("can be compressed" in warning.value for warning in test.warning)
    shapes = [shape for shape in read_model(tmp_path).facts.matrices if shape.expert is not None]
    assert {(shape.kind, shape.d_out, shape.d_in, shape.active) for shape in shapes} == {
        ("experts.gate", 48, 24, 0.25),
        ("experts.up", 48, 24, 0.25),
    }

"""What of a model can be compressed: a table that adds up, one list for every ratio, and words on every command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, built, load_family
from torch import nn
from transformers import PreTrainedModel

from lowrank_core.cli import main
from lowrank_core.compression.build import CompressionReport
from lowrank_core.config import CalibrationConfig, ModelSource
from lowrank_core.coverage import KINDS, Coverage, kind_by_name, shown
from lowrank_core.evaluation import evaluate
from lowrank_core.export.manifest import read_manifest, report_of
from lowrank_core.models import ModelHandle, describe, load_model
from lowrank_core.models.handle import find_layers
from lowrank_core.statistics.calibration import statistics_key
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.text import WindowSet


def counted(module: PreTrainedModel, *endings: str) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith(endings))


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_in_one_row(name: str, tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, name)
    table = handle.coverage
    assert table.total == handle.parameters == sum(p.numel() for p in handle.module.parameters())
    assert set(table.parameters) <= set(KINDS)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert table.compressible == handle.linear_parameters == sum(shape.dense_parameters for shape in handle.shapes)
    assert all(row.why for row in table.rows if row.kind not in ("linear", "expert"))


SHOWN_BY_A_PASS = ("deepseek_v32", "gemma4_text")
"""What runs without gradients; buffers that lie beside the parameters."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SHOWN_BY_A_PASS])
def test_headers_tell_the_same_but_for_what_only_a_pass_shows(name: str, tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, name)
    facts = read_model(tmp_path).facts
    assert dict(facts.coverage.parameters) == dict(handle.coverage.parameters)
    assert facts.compressible_parameters == handle.linear_parameters


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "jetmoe", "jamba"])
def test_experts_can_be_compressed_and_routers_are_left_alone(name: str, tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, name)
    native = built(name)
    experts = sum(p.numel() for path, p in native.named_parameters() if p.ndim == 3 and "conv" not in path)
    biases = counted(native, "gate_up_proj_bias", "down_proj_bias")
    assert handle.coverage.parameters["expert"] == experts + biases
    assert handle.coverage.parameters["router"] == counted(native, "mlp.gate.weight", "router.weight", "router.bias", "router.layer.weight")
    assert handle.coverage.inner_share >= 0.9


def test_convolutions_and_recurrences_are_no_linears(tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, "jamba")
    assert handle.coverage.parameters["convolution"] == counted(handle.module, "conv1d.weight", "conv1d.bias")
    assert handle.coverage.parameters["recurrence"] == counted(handle.module, "A_log", "mamba.D")
    assert handle.coverage.parameters["unreached"] == counted(handle.module, "dt_proj.weight", "dt_proj.bias")


@pytest.mark.parametrize("name", ["mixtral", "mixtral_many", "qwen2_moe", "jetmoe"])
def test_routers_and_one_row_gates_are_left_alone(name: str, tmp_path: Path, sample_text: str):
    """However many experts there are: a router with 20 outputs is no narrow map."""
    handle = load_family(tmp_path, sample_text, name)
    names = [layer.name for layer in handle.layers]
    assert names
    assert not any("router" in name or name.endswith(("mlp.gate", "shared_expert_gate")) for name in names)
    assert all(layer.shape.d_out >= 16 for layer in handle.layers)


def test_a_router_that_is_a_linear_layer_is_seen_by_what_it_stands_beside(tmp_path: Path, sample_text: str):
    """No name tells: as many outputs as the module that holds it has experts."""
    handle = load_family(tmp_path, sample_text, "mixtral_many")
    before = handle.coverage.parameters["router"]
    layer = handle.module.model.layers[0].mlp
    layer.chooser = nn.Linear(32, 20, bias=False)
    result = replace(handle)
    assert result.coverage.parameters["router"] == before + 20 * 32


def test_a_linear_with_a_forward_of_its_own_counts_where_it_is_linear(tmp_path: Path, sample_text: str):
    handle = load_family(tmp_path, sample_text, "falcon")
    assert {layer.shape.kind for layer in handle.layers} == {"q_proj", "k_proj", "v_proj", "dense", "dense_h_to_4h", "dense_4h_to_h"}

    class Scaled(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    special = handle.module.transformer.h[0].mlp.dense_h_to_4h
    special.__class__ = Scaled
    again = replace(handle, layers=find_layers(handle.module))
    assert "transformer.h.0.mlp.dense_h_to_4h" not in [layer.name for layer in again.layers]
    assert again.coverage.parameters["special"] == sum(p.numel() for p in special.parameters())


def test_shared_layers_and_low_rank_ones_have_rows_of_their_own(llama: ModelHandle):
    from exported import all_forms

    smaller = all_forms(llama).handle
    assert smaller.coverage.total == smaller.parameters
    assert smaller.coverage.parameters["lowrank"] + smaller.coverage.parameters["linear"] == smaller.linear_parameters


def test_the_description_holds_the_table_and_it_can_be_read_back(llama: ModelHandle):
    rows = json.loads(json.dumps(describe(llama)["coverage"]))
    assert Coverage.from_mapping(rows) == llama.coverage
    assert Coverage.from_mapping([{"kind": "of_tomorrow", "parameters": 5}]).rows[0].label == "of_tomorrow"
    with pytest.raises(KeyError):
        Coverage.from_mapping([{"kind": "linear"}])


# --- words -----------------------------------------------------------------------------------------------------------

MAX_EXPERTS = Coverage.of([("linear", 30), ("experts", 900), ("tied", 70)])


def test_a_ratio_is_told_for_the_whole_model():
    assert MAX_EXPERTS.ratio_words(0.3) == "30.0 % of the compressible linears = 0.9 % of the model"
    assert MAX_EXPERTS.statement() == (
        "3.0 % of the model's parameters can be compressed; not compressible: other experts 90.0 %, tied embeddings 7.0 %"
    )


def test_what_a_ratio_counts_is_called_the_same_inside_and_outside_experts():
    rows = Coverage.of([("linear", 30), ("expert", 60)]).rows
    assert [row.label for row in rows] == ["compressible linears", "compressible linears of experts"]


def test_little_is_a_warning_and_much_is_none():
    warning = MAX_EXPERTS.warning(0.3)
    assert warning is not None
    assert warning.startswith("only 3.2 % of the parameters outside the embeddings can be compressed")
    assert "other experts, 90.0 % of the model" in warning
    assert MAX_EXPERTS.ratio_words(0.3) in warning
    assert Coverage.of([("linear", 30), ("tied", 900), ("vector", 1)]).warning() is None
    assert Coverage.of([("linear", 10), ("tied", 900)]).warning() is None


def test_a_small_share_is_never_shown_as_none():
    assert [shown(value) for value in (0, 0.5, 0.0004, 1)] == ["0.0 %", "50.0 %", "0.04 %", "100.0 %"]


@pytest.mark.parametrize(
    ("path", "shape", "kind"),
    [
        ("mlp.experts.3.gate_proj.weight", (64, 32), "expert"),
        ("mlp.experts.gate_up_proj", (4, 64, 32), "expert"),
        ("mlp.experts.gate_up_proj_bias", (4, 64), "expert"),
        ("self_attention.experts.bias", (32,), "vector"),
        ("block_sparse_moe.input_linear.weight", (4, 64, 32), "expert"),
        ("mlp.shared_experts.up_proj.weight", (64, 32), "linear"),
        ("mlp.gate.weight", (64, 32), "router"),
        ("mlp.gate_proj.weight", (64, 32), "linear"),
        ("mlp.shared_expert_gate.weight", (1, 32), "narrow"),
        ("mlp.tiny.weight", (15, 32), "narrow"),
        ("mlp.tiny.weight", (16, 32), "linear"),
        ("mixer.conv1d.weight", (64, 1, 4), "convolution"),
        ("conv.in_proj.weight", (64, 32), "linear"),
        ("mixer.A_log", (64, 8), "recurrence"),
        ("rg_lru.recurrent_gate_weight", (4, 8, 8), "recurrence"),
        ("attention.time_mix_key", (1, 1, 32), "recurrence"),
        ("input_layernorm.weight", (32,), "vector"),
        ("self_attn.q_proj.bias", (32,), "vector"),
        ("mlp.keys", (2, 8, 8), "other"),
    ],
)
def test_kinds_by_name_and_shape(path: str, shape: tuple[int, ...], kind: str):
    assert kind_by_name(path, shape, experts=True) == kind


def test_a_gate_is_a_router_only_where_there_are_experts():
    assert kind_by_name("attention.gate.weight", (32, 32), experts=False) == "linear"


# --- one list for every ratio ----------------------------------------------------------------------------------------


def compressed(folder: Path, text_file: Path, dense: Path) -> CompressionReport:
    """Compress on the command line at 0.3; return what the folder says of itself."""
    text = ["--text", f"file:{text_file}", "--context", "16", "--windows", "24"]
    assert main(["compress", "--model", str(dense), *text, "--compression-ratio", "0.3", "--out", str(folder)]) == 0
    return report_of(read_manifest(folder))


@pytest.mark.parametrize("name", ["jamba", "mamba", "mixtral"])
def test_one_ratio_when_made_when_written_and_when_measured(
    name: str, tmp_path: Path, sample_text: str, text_file: Path, windows: WindowSet
):
    """A layer that no pass calls counted in one place and not in the other: 0.3 was 0.295."""
    dense = load_family(tmp_path / "dense", sample_text, name)
    report = compressed(tmp_path / "small", text_file, tmp_path / "dense")
    assert report.compression_ratio >= 0.3 - 1e-9
    assert report.linear_parameters_before == sum(shape.dense_parameters for shape in dense.shapes)
    measured = evaluate(load_model(ModelSource(str(tmp_path / "small"))), windows.first(4), against=dense)
    assert measured.compression_ratio == pytest.approx(report.compression_ratio, abs=1e-12)
    assert measured.dense_compressible_parameters == report.linear_parameters_before
    assert measured.compressible_parameters == report.linear_parameters_after
    assert report.dense_coverage == dense.coverage
    assert report.dense_coverage.of_model(report.compression_ratio) == pytest.approx(report.model_compression_ratio)


def test_a_record_of_an_earlier_version_says_how_much_and_no_more(tmp_path: Path, sample_text: str, text_file: Path):
    load_family(tmp_path / "dense", sample_text, "mixtral")
    compressed(tmp_path / "small", text_file, tmp_path / "dense")
    path = tmp_path / "small" / "lowrank.json"
    body = json.loads(path.read_text())
    del body["coverage"]
    path.write_text(json.dumps(body))
    report = report_of(read_manifest(tmp_path / "small"))
    assert report.dense_coverage.compressible == report.linear_parameters_before
    assert set(report.dense_coverage.parameters) == {"linear", "unrecorded"}


def test_statistics_are_keyed_by_the_layers_and_what_they_read(llama: ModelHandle, windows: WindowSet):
    key = statistics_key(llama, windows, CalibrationConfig())
    fewer = replace(llama, layers=llama.layers[:-1])
    assert statistics_key(fewer, windows, CalibrationConfig()) != key
    first = replace(llama.layers[1], shape=replace(llama.layers[1].shape, input_group=llama.layers[1].name))
    apart = replace(llama, layers=(llama.layers[0], first, *llama.layers[2:]))
    assert statistics_key(apart, windows, CalibrationConfig()) != key
    assert statistics_key(replace(llama, layers=llama.layers[::-1]), windows, CalibrationConfig()) == key


# --- the commands ----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(list(words)) == 0
    result = capsys.readouterr()
    return result.out, result.err


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_every_command_says_what_is_left_alone(
    name: str, tmp_path: Path, sample_text: str, text_file: Path, capsys: pytest.CaptureFixture[str]
):
    dense = load_family(tmp_path / "dense", sample_text, name)
    statement = f"{dense.coverage.statement()}."
    common = ["--text", f"file:{text_file}", "--context", "16", "--windows", "16"]
    model = ["--model", str(tmp_path / "dense"), *common]
    out, _ = run(capsys, "analyze", *model)
    assert statement in out
    body = json.loads(run(capsys, "analyze", *model, "--json")[0])
    assert Coverage.from_mapping(body["model"]["coverage"]) == dense.coverage
    assert (len(body["model"]["heads"]), body["model"]["heads_dropped"]) == (2, [])
    out, err = run(capsys, "compress", *model, "--compression-ratio", "0.2", "--out", str(tmp_path / "small"))
    assert statement in out
    assert ("warning: only" in err) == (dense.coverage.warning() is not None)
    assert f"Of the base model, {dense.coverage.statement()}." in (tmp_path / "small" / "README.md").read_text()
    out, _ = run(capsys, "evaluate", "--model", str(tmp_path / "small"), "--against", str(tmp_path / "dense"), *common)
    assert statement in out
    out, _ = run(
        capsys, "search", *model, "--compression-ratio", "0.2", "--trials", "3", "--confirmed", "0", "--run", str(tmp_path / "run")
    )
    assert statement in out
    assert "of the compressible linears = " in out
    exported = ["export", "--run", str(tmp_path / "run"), "--trial", "best"]
    assert statement in run(capsys, *exported, "--out", str(tmp_path / "best"))[0]
    body = json.loads(run(capsys, *exported, "--out", str(tmp_path / "again"), "--json")[0])
    assert Coverage.from_mapping(body["coverage"]) == dense.coverage
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    warning = dense.coverage.warning(0.2)
    assert warning is None or warning in status["warnings"]

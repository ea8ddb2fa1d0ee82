"""The dense merge: the same function in the plain architecture, for a runtime that knows nothing of us; and not smaller."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import all_forms, logits_of
from safetensors.torch import load_file

from lowrank_core.config import ExportConfig, ModelSource, TextConfig
from lowrank_core.errors import ModelError
from lowrank_core.evaluation import evaluate
from lowrank_core.export import HeldOut, biases_without_place, check_form, export, read_manifest
from lowrank_core.export.card import written_words
from lowrank_core.export.dense import merged
from lowrank_core.export.manifest import report_of
from lowrank_core.layers.base import CompressedModule
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.text import WindowSet

DENSE = ExportConfig(form="dense")
WITHOUT_OURS = """
import sys, numpy, torch
sys.modules["lowrank_core"] = None
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    with torch.inference_mode():
        model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"], told
        numpy.save(folder + ".plain", model(input_ids=torch.tensor([range(24)])).logits.numpy())
"""


def _dense(request: pytest.FixtureRequest, name: str) -> ModelHandle:
    return load_model(ModelSource(str(request.getfixturevalue(f"{name}_checkpoint"))))


def test_plain_transformers_computes_the_same(request: pytest.FixtureRequest, tmp_path: Path):
    cases = [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("qwen2", False)]
    models = {f"{name}-{centred}": all_forms(_dense(request, name), centred=centred) for name, centred in cases}
    for case, model in models.items():
        export(model, tmp_path / case, provenance={}, config=DENSE)
    command = [sys.executable, "-I", "-c", WITHOUT_OURS, *(str(tmp_path / case) for case in models)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for case, model in models.items():
        expected = logits_of(model.handle.module).numpy()
        np.testing.assert_allclose(np.load(tmp_path / f"{case}.plain.npy"), expected, atol=1e-5, err_msg=case)
        config = json.loads((tmp_path / case / "config.json").read_text())
        assert "quantization_config" not in config


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_the_tensors_are_those_of_the_dense_checkpoint(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    """A converter for another runtime finds every name and shape that it knows."""
    export(all_forms(_dense(request, name)), tmp_path / "out", provenance={}, config=DENSE)
    before = load_file(request.getfixturevalue(f"{name}_checkpoint") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in before.items()} == {key: tensor.shape for key, tensor in after.items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_biases_that_the_config_has_a_flag_for_are_written(request: pytest.FixtureRequest, tmp_path: Path):
    model = all_forms(_dense(request, "llama"), centred=True)
    export(model, tmp_path / "out", provenance={}, config=DENSE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attention_bias"]
    assert config["mlp_bias"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["model.layers.1.mlp.down_proj.bias"], torch.zeros(32))  # left dense, had none
    assert weights["model.layers.0.mlp.down_proj.bias"].abs().max() > 0
    assert not model.handle.module.config.attention_bias  # the given model is as it was


def test_biases_without_a_place_are_refused(request: pytest.FixtureRequest, tmp_path: Path):
    model = all_forms(_dense(request, "qwen2"), centred=True)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM has no place for the biases .* \d+ layers .*o_proj.*adds none: .*whitened"):
        export(model, tmp_path / "out", provenance={}, config=DENSE)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_and_the_card_say_that_it_is_not_smaller(request: pytest.FixtureRequest, tmp_path: Path):
    dense = _dense(request, "llama")
    model = all_forms(dense)
    manifest = export(model, tmp_path / "out", provenance={}, config=DENSE)
    assert read_manifest(tmp_path / "out").to_mapping() == json.loads(json.dumps(manifest.to_mapping()))
    assert manifest.written_parameters == dense.parameters > model.report.parameters_after
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**it is not smaller**" in card
    assert f"{dense.parameters:,} numbers" in card
    assert f"{model.report.parameters_after:,}: the dense form" in card
    assert "lowrank_core" not in card


def test_biases_without_a_place_can_be_left_out_and_what_that_costs_is_measured(
    request: pytest.FixtureRequest, tmp_path: Path, windows: WindowSet
):
    dense = _dense(request, "qwen2")
    assert any(name.endswith("o_proj") for name in biases_without_place(dense))
    model = all_forms(dense, centred=True)
    config = replace(DENSE, drop_biases=True)
    test = HeldOut(TextConfig("random tokens", context=windows.context), windows.first(4))
    manifest = export(model, tmp_path / "out", config=config, test=test)
    dropped = manifest.details["dropped_biases"]
    with_them = evaluate(model.handle, windows.first(4)).perplexity
    without = evaluate(load_model(ModelSource(str(tmp_path / "out"))), windows.first(4)).perplexity
    assert dropped["perplexity_with_them"] == pytest.approx(with_them, rel=1e-5)
    assert manifest.measured is not None
    assert manifest.measured.perplexity == pytest.approx(without, rel=1e-5)
    assert with_them != pytest.approx(without, rel=1e-3)
    assert f"the metric gave {dropped['layers']} layers, so they were left out" in (tmp_path / "out" / "README.md").read_text()
    words = written_words(manifest)
    assert words.startswith(f"{manifest.written_parameters:,} numbers in {manifest.written_bytes:,} bytes, multiplied out")
    assert "no smaller than the dense model. As factors: " in words
    assert f"left out: perplexity {without:.6g} in place of {with_them:.6g}" in words


def test_what_is_printed_of_a_folder_counts_what_was_written(request: pytest.FixtureRequest, tmp_path: Path):
    model = all_forms(_dense(request, "llama"))
    floats = export(model, tmp_path / "floats")
    int8 = export(model, tmp_path / "int8", config=ExportConfig(quantization="int8"))
    assert f"{model.report.compression_ratio:.1%} of the compressible" in written_words(floats)
    assert f"to {report_of(int8).linear_parameters_after:,})" in written_words(int8)  # each row of a factor has a scale
    for manifest in (floats, int8):
        assert written_words(manifest).startswith(f"{manifest.written_parameters:,} numbers in {manifest.written_bytes:,} bytes")
    assert report_of(int8).linear_parameters_after > model.report.linear_parameters_after


def test_what_can_not_be_merged_is_known_before_anything_is_calibrated(request: pytest.FixtureRequest):
    centred, plain = metric_named("two_sided"), metric_named("whitened")
    with pytest.raises(ModelError, match="--drop-biases"):
        check_form(_dense(request, "qwen2"), centred, DENSE)
    for basis, config in ((plain, DENSE), (centred, ExportConfig()), (centred, replace(DENSE, drop_biases=True))):
        check_form(_dense(request, "qwen2"), basis, config)
    check_form(_dense(request, "llama"), centred, DENSE)  # its config has flags for biases


def test_merging_leaves_the_given_model_as_it_was_and_keeps_ties(request: pytest.FixtureRequest):
    model = all_forms(_dense(request, "llama"))
    before = model.handle.fingerprint
    module, _ = merged(model.handle.module)
    assert ModelHandle("again", model.handle.module, model.handle.tokenizer, (), torch.float32).fingerprint == before
    assert not any(isinstance(child, CompressedModule) for child in module.modules())
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


def test_a_model_that_was_loaded_from_an_export_can_be_merged(request: pytest.FixtureRequest, tmp_path: Path):
    model = all_forms(_dense(request, "llama"))
    export(model, tmp_path / "factors", provenance={})
    loaded = load_model(ModelSource(str(tmp_path / "factors")))
    module, _ = merged(loaded.module)
    assert not hasattr(module.config, "quantization_config")
    torch.testing.assert_close(logits_of(module), logits_of(model.handle.module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spoil", [lambda data: data[:-100], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_merge_is_told_by_ours(spoil, request: pytest.FixtureRequest, tmp_path: Path):
    export(all_forms(_dense(request, "llama")), tmp_path / "out", provenance={}, config=DENSE)
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors is (damaged or cut short|not what was exported)"):
        load_model(ModelSource(str(tmp_path / "out")))

"""The plain form computes what the model does, without our package; what it has no place for is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from exported import IDS, all_forms, logits_of
from families import built
from safetensors import safe_open
from torch import Tensor

from lowrank_core.cli import main
from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.quantization import grids_of, quantized
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.export import check_form, convert, export, read_manifest, verify
from lowrank_core.layers.plain import PlainFactors
from lowrank_core.metrics import METRICS
from lowrank_core.models import load_model
from lowrank_core.models.hf import compressed_modules
from lowrank_core.models.plain import plain_class
from lowrank_core.models.unrolled import replace_module

PLAIN = ExportConfig(form="plain")
CASES = ("llama", "gpt2", "qwen2", "mixtral")
"""Heads, stacks and pivots of every kind; Conv1D; biases of the architecture's own; dense experts that transformers stores joined."""

TRUSTING = """
import json, sys
import plain_transformers  # our package is not there
import torch
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.tensor([range(24)])
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    base, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    same = torch.allclose(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state, atol=1e-4)
    untrusted = [way for way, load in plain_transformers.ways().items() if plain_transformers.outcome(load, folder) == "loaded"]
    print(json.dumps([tokens[0, 24:].tolist(), model(ids).logits.sum().item(), same, [*info["missing_keys"], *untrusted]]))
assert "lowrank_core" not in sys.modules
"""


@pytest.fixture(scope="module")
def mixtral_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("mixtral"), built("mixtral"), sample_text)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> dict[str, CompressedModel]:
    """Every form in each, but for parts of one matrix, which become dense."""
    result = {}
    for case in CASES:
        model = all_forms(load_model(ModelSource(str(request.getfixturevalue(f"{case}_checkpoint")))), centred=case in ("llama", "gpt2"))
        for name, child in list(compressed_modules(model.handle.module)):
            if ".c_attn." in name or ".experts." in name:
                layer = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                layer.weight = torch.nn.Parameter(child.weight.detach(), requires_grad=False)
                layer.bias = child.bias
                replace_module(model.handle.module, name, layer)
        result[case] = model
    return result


@pytest.fixture(scope="module")
def folders(models: dict[str, CompressedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    for case, model in models.items():
        export(model, root / case, config=PLAIN)
    return {case: root / case for case in CASES}


def _tokens(model: CompressedModel) -> list[int]:
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    tokens: Tensor = model.handle.module.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    return tokens[0, 24:].tolist()


def test_without_our_package_it_writes_the_same_tokens_and_without_trust_no_way_of_transformers_loads_it(
    models: dict[str, CompressedModel], folders: dict[str, Path], tmp_path: Path
):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TRUSTING, *map(str, folders.values())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(lines) == len(CASES), done.stderr[-2000:]
    for case, (tokens, total, same, wrong) in zip(CASES, lines, strict=True):
        assert tokens == _tokens(models[case]), case
        assert total == pytest.approx(float(logits_of(models[case].handle.module).sum()), rel=1e-4), case
        assert same, case
        assert not wrong, case


@pytest.mark.parametrize("case", CASES)
def test_we_read_it_as_factors_without_running_its_code(
    case: str, models: dict[str, CompressedModel], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(os.environ, "HF_MODULES_CACHE", "/dev/null/none")
    loaded = load_model(ModelSource(str(folders[case])))
    assert torch.equal(logits_of(loaded.module), logits_of(models[case].handle.module))
    assert type(loaded.module).__name__ == type(models[case].handle.module).__name__
    assert not any(isinstance(child, PlainFactors) for child in loaded.module.modules())
    assert {child.form for _, child in compressed_modules(loaded.module)} == {"factored"}
    assert not hasattr(loaded.module.config, "auto_map")


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_is_counted(case: str, folders: dict[str, Path]):
    manifest = read_manifest(folders[case])
    numbers = 0
    with safe_open(folders[case] / "model.safetensors", framework="pt") as archive:
        shapes = {name: archive.get_slice(name).get_shape() for name in archive.keys()}  # noqa: SIM118  (no mapping)
        numbers = sum(archive.get_tensor(name).numel() for name in shapes)
    assert (manifest.form, manifest.written_parameters) == ("plain", numbers)
    assert manifest.guards == sum(shape == [0] for shape in shapes.values()) > 0
    assert "quantization_config" not in json.loads((folders[case] / "config.json").read_text())


def test_the_module_that_it_brings_is_short_and_knows_nothing_of_us(folders: dict[str, Path]):
    source = (folders["llama"] / "modeling_lowrank_plain.py").read_text()
    assert "lowrank_core" not in source
    assert len(source.splitlines()) < 70
    card = (folders["llama"] / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "vllm serve path/to/this/folder --trust-remote-code" in card


def test_an_export_is_written_in_the_plain_form(models: dict[str, CompressedModel], folders: dict[str, Path], tmp_path: Path, capsys):
    model = models["qwen2"]
    export(model, tmp_path / "compressed", provenance={"preset": "svd"})
    assert main(["export", "--from", str(tmp_path / "compressed"), "--form", "plain", "--out", str(tmp_path / "plain")]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert read_manifest(tmp_path / "plain").details["preset"] == "svd"
    one, other = (folder / "model.safetensors" for folder in (tmp_path / "plain", folders["qwen2"]))
    assert one.read_bytes() == other.read_bytes()
    convert(tmp_path / "plain", tmp_path / "dense", ExportConfig(form="dense", drop_biases=True))
    assert read_manifest(tmp_path / "dense").form == "dense"
    with pytest.raises(ModelError, match="is a dense merge: no form with factors"):
        convert(tmp_path / "dense", tmp_path / "again", PLAIN)


def _in_int8(model: CompressedModel) -> CompressedModel:
    return quantized(model, grids_of(model.handle, "int8", "none"), scales=torch.float32)


def test_what_has_no_place_is_refused_in_a_line(request: pytest.FixtureRequest, models: dict[str, CompressedModel], tmp_path: Path):
    gpt2 = all_forms(load_model(ModelSource(str(request.getfixturevalue("gpt2_checkpoint")))))
    cases = {
        r"GPT2LMHeadModel holds 3 of the compressed layers in a matrix that they share": gpt2,
        "quantised layers would be rounded again": _in_int8(models["qwen2"]),
        "no layer of this model has two factors": replace(models["qwen2"], handle=_with_heads_alone(models["qwen2"])),
    }
    for message, model in cases.items():
        with pytest.raises(ModelError, match=message):
            export(model, tmp_path / "out", config=PLAIN)
        assert not (tmp_path / "out").exists()
    for options, message in (
        ({"quantization": "int8"}, "a plain folder holds floats alone"),
        ({"with_code": True}, "a module of its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(PLAIN, **options)


def _with_heads_alone(model: CompressedModel):
    module = copy.deepcopy(model.handle.module)
    for name, child in list(compressed_modules(module)):
        if child.form not in ("value_heads", "output_heads"):
            layer = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            replace_module(module, name, layer)
    return replace(model.handle, module=module)


def test_a_config_that_names_no_factors_is_refused(folders: dict[str, Path], llama_checkpoint: Path, tmp_path: Path):
    for ranks, biases in (({"model.layers.0.mlp.up_proj": "12"}, []), ([], []), ({"model.layers.0.mlp.up_proj": 12}, None)):
        folder = tmp_path / "damaged"
        folder.mkdir(exist_ok=True)
        for path in folders["llama"].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        body = json.loads((folder / "config.json").read_text()) | {"lowrank_ranks": ranks, "lowrank_biases": biases}
        (folder / "config.json").write_text(json.dumps(body))
        with pytest.raises(ModelError, match=r"doesn't say which layers are factors"):
            load_model(ModelSource(str(folder)))
    with pytest.raises(ModelError, match="doesn't say which layers are factors"):
        plain_class(load_model(ModelSource(str(llama_checkpoint))).module.config)


def test_a_model_type_without_a_text_model_is_refused_before_work(llama_checkpoint: Path):
    handle = load_model(ModelSource(str(llama_checkpoint)))
    check_form(handle, METRICS["weight_svd"], PLAIN)
    handle = replace(handle, module=copy.deepcopy(handle.module))
    handle.module.config.__class__ = type("OtherConfig", (type(handle.module.config),), {})
    with pytest.raises(ModelError, match="has no text model of its own in transformers"):
        check_form(handle, METRICS["weight_svd"], PLAIN)


@pytest.mark.slow
def test_it_is_verified_like_any_export(models: dict[str, CompressedModel], tmp_path: Path, text_file: Path):
    from lowrank_core.config import TextConfig
    from lowrank_core.export import held_out

    text = held_out(models["llama"].handle, TextConfig(f"file:{text_file}", context=32, test_windows=4))
    export(models["llama"], tmp_path / "out", config=PLAIN, test=text)
    assert verify(tmp_path / "out").ok

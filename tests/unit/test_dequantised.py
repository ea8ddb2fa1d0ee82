"""Checkpoints in fp8 and mxfp4, which transformers dequantises: plain models afterwards, from headers to the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.export import read_manifest
from lowrank_core.files import checkpoints
from lowrank_core.models import ModelHandle, load_model, notes_of
from lowrank_core.studio.overview.checkpoint import read_model

SMALL = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
IDS = torch.arange(5, 45)[None]


def _rewrite(folder: Path, tensors: dict[str, Tensor], stated: dict[str, object]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in blocks of 128 x 128 with a scale each."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // 128, 128, columns // 128, 128)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn), scales


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts (E, d_in, d_out) as (E, d_out, d_in / 32, 16) bytes of two numbers each, and the exponents of the groups."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    codes = (groups / exponents.exp2()[..., None]).unsqueeze(-1).sub(LEVELS).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("plain")
    qwen = Qwen3Config(**SMALL, hidden_size=128, intermediate_size=128, head_dim=64, tie_word_embeddings=True)
    oss = GptOssConfig(
        **SMALL, hidden_size=64, intermediate_size=64, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0
    )
    models = {"fp8": Qwen3ForCausalLM(qwen), "mxfp4": GptOssForCausalLM(oss)}
    return {name: save_checkpoint(root / name, model, sample_text) for name, model in models.items()}


@pytest.fixture(scope="module")
def quantised(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    result = {name: Path(shutil.copytree(folder, root / name)) for name, folder in plain.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(result["fp8"] / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = _fp8(tensor)
        else:
            tensors[name] = tensor.bfloat16()
    _rewrite(
        result["fp8"], tensors, {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    )
    tensors = {}
    for name, tensor in load_file(result["mxfp4"] / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _mxfp4(tensor)
        else:
            tensors[name] = tensor.bfloat16()
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _rewrite(result["mxfp4"], tensors, {"quant_method": "mxfp4", "modules_to_not_convert": left})
    return result


def _load(folder: Path) -> ModelHandle:
    return load_model(ModelSource(str(folder)))


def _logits(module: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return module(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_it_is_the_plain_model_up_to_rounding(method: str, plain: dict[str, Path], quantised: dict[str, Path]):
    handle, dense = _load(quantised[method]), _load(plain[method])
    gap = (_logits(handle.module) - _logits(dense.module)).norm() / _logits(dense.module).norm()
    assert 0 < gap < 0.3
    assert [layer.shape for layer in handle.layers] == [layer.shape for layer in dense.layers]
    assert handle.parameters == dense.parameters
    assert (handle.dtype, handle.stored_dtype) == ("float32", torch.bfloat16)
    assert not hasattr(handle.module.config, "quantization_config")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_headers_tell_what_the_worker_finds(method: str, quantised: dict[str, Path]):
    model, handle = read_model(quantised[method]), _load(quantised[method])
    assert model.facts.parameters == handle.parameters
    assert model.facts.compressible_parameters == handle.linear_parameters
    assert model.facts.stored_dtype == "bfloat16"
    assert model.notes == notes_of(str(quantised[method]))
    (note,) = model.notes
    assert f"is quantised ({method}, {8 if method == 'fp8' else 4} bits): dequantised when it is read" in note


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_what_is_saved_of_it_is_an_ordinary_folder(method: str, quantised: dict[str, Path], tmp_path: Path):
    handle = _load(quantised[method])
    handle.module.save_pretrained(tmp_path / "dense")
    again = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    torch.testing.assert_close(again, _logits(handle.module), rtol=0, atol=1e-5)  # experts are multiplied in another order
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_its_export_is_an_ordinary_one(quantised: dict[str, Path], text_file: Path, tmp_path: Path):
    command = ["compress", "--model", str(quantised["fp8"]), "--text", f"file:{text_file}", "--context", "32", "--windows", "8"]
    command += ["--preset", "svd", "--compression-ratio", "0.3", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert read_manifest(tmp_path / "out").stored_dtype == "bfloat16"
    assert torch.isfinite(_logits(_load(tmp_path / "out").module)).all()
    assert "dequantised when it is read" in (tmp_path / "out" / "README.md").read_text()


def test_an_earlier_transformers_refuses_it(quantised: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """5.10 and 5.13 save what they dequantised under names that they don't read again."""
    monkeypatch.setattr(checkpoints, "version", lambda _: "5.13.1")
    for read in (_load, read_model):
        with pytest.raises(ModelError, match=r"is quantised \(fp8, 8 bits\)"):
            read(quantised["fp8"])


def test_fp8_without_blocks_is_refused(plain: dict[str, Path]):
    with pytest.raises(ModelError, match=r"is quantised \(fp8, 8 bits\)"):
        checkpoints.check_unquantized({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}, "x")

"""What is written runs in the dtype that it is written in, and names no code that is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import all_forms
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.errors import NumericalError
from lowrank_core.export import check_precision, export
from lowrank_core.models import ModelHandle, load_model

OVERFLOWS = r"the model gives NaN or Inf in float16, .* Write bfloat16 or float32 \(--dtype of `lowrank export`, --export-dtype of"


def _changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.fixture
def loud(llama_checkpoint: Path, tmp_path: Path) -> Path:
    """A model whose weights fit into float16, and whose hidden states don't: the first feed-forward part adds some 1e7."""
    folder = Path(shutil.copytree(llama_checkpoint, tmp_path / "loud"))
    return _changed(folder, lambda name, tensor: tensor * 3000 if "layers.0.mlp" in name else tensor)


@pytest.fixture
def louder(loud: Path) -> Path:
    """The same, stored in float16: nobody asked for that dtype."""
    return _changed(loud, lambda name, tensor: tensor.half())


def _load(folder: Path) -> ModelHandle:
    return load_model(ModelSource(str(folder)))


@pytest.mark.parametrize("form", ["compressed", "dense"])
def test_a_dtype_in_which_the_model_overflows_is_refused(form: str, loud: Path, tmp_path: Path):
    model = all_forms(_load(loud))
    with pytest.raises(NumericalError, match=OVERFLOWS) as refused:
        export(model, tmp_path / "out", config=ExportConfig(form=form, dtype="float16"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", config=ExportConfig(form=form, dtype="bfloat16"))
    ids = torch.arange(5, 40)[None]
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(ids).logits).all()


def test_so_is_the_dtype_of_the_checkpoint(louder: Path, tmp_path: Path):
    handle = _load(louder)
    assert handle.stored_dtype == torch.float16
    with pytest.raises(NumericalError, match=OVERFLOWS):
        export(all_forms(handle), tmp_path / "out")
    with pytest.raises(NumericalError, match=OVERFLOWS):
        check_precision(handle, ExportConfig(), None)
    check_precision(handle, ExportConfig(dtype="bfloat16"), None)


def test_compress_refuses_it_before_calibrating(
    louder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def too_late(*_: object) -> None:
        raise AssertionError("calibrated before the dtype was checked")

    command = ["compress", "--model", str(louder), "--text", f"file:{text_file}", "--context", "32", "--windows", "8"]
    command += ["--preset", "svd", "--compression-ratio", "0.3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("lowrank_core.commands.compress.reported", too_late)
    assert main(command) == 1
    assert "the model gives NaN or Inf in float16" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--export-dtype", "bfloat16"]) == 0


def test_a_model_that_runs_in_float16_is_written_in_it(llama: ModelHandle, tmp_path: Path):
    check_precision(llama, ExportConfig(dtype="float16"), None)
    assert export(all_forms(llama), tmp_path / "out", config=ExportConfig(dtype="float16")).stored_dtype == "float16"


@pytest.mark.parametrize("form", ["compressed", "dense"])
def test_the_code_of_a_natively_supported_checkpoint_is_not_named(form: str, llama_checkpoint: Path, tmp_path: Path):
    """It is not copied either: an ``auto_map`` that was kept made ``trust_remote_code`` look for a file that is not there."""
    folder = Path(shutil.copytree(llama_checkpoint, tmp_path / "old"))
    for name, entry in (
        ("config.json", {"AutoModelForCausalLM": "modeling_old.Old"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["t.Old", None]}),
    ):
        body = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**body, "auto_map": entry}))
    out = tmp_path / "out"
    export(all_forms(_load(folder)), out, config=ExportConfig(form=form))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())
    if form == "dense":
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    else:
        export(all_forms(_load(folder)), tmp_path / "coded", config=ExportConfig(with_code=True))
        assert json.loads((tmp_path / "coded" / "config.json").read_text())["auto_map"] == {
            "AutoModelForCausalLM": "modeling_lowrank.LlamaForCausalLM"
        }

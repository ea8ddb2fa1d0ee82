"""Reload and measure again: the same to rounding, or told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import all_forms
from safetensors.torch import load_file, save_file

from lowrank_core.cli import main
from lowrank_core.cli.verify import _told
from lowrank_core.config import ExportConfig, TextConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.export import export, held_out, verify
from lowrank_core.export.manifest import listed_files
from lowrank_core.export.verification import tolerance_of
from lowrank_core.models import ModelHandle


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> TextConfig:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text(sample_text)
    return TextConfig(f"file:{path}", context=32, test_windows=6)


@pytest.fixture(scope="module")
def whole(llama: ModelHandle, text: TextConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "out"
    export(all_forms(llama), folder, provenance={}, config=ExportConfig(dtype="bfloat16"), test=held_out(llama, text))
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def _edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "lowrank.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def test_a_fresh_process_measures_the_same(whole: Path):
    result = verify(whole)
    assert result.ok
    assert result.files == 1
    assert _told(result).startswith("1 file is unchanged\n")
    assert result.recorded == json.loads((whole / "lowrank.json").read_text())["measured"]["perplexity"]
    assert result.measured == pytest.approx(result.recorded, rel=1e-9)
    assert result.difference == result.measured - result.recorded
    assert 0 < result.tolerance < 1e-3
    assert "test split: 6 non-overlapping windows of 32 tokens" in result.protocol


def test_another_model_behind_right_hashes_is_told(copied: Path, capsys: pytest.CaptureFixture[str]):
    """Weights that were changed together with the list of files: only measuring finds it."""
    path = copied / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 1.01}, path, {"format": "pt"})
    files = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in listed_files(copied).items()}
    _edit(copied, lambda body: body.update(files=files))
    assert main(["verify", "--model", str(copied)]) == 1
    assert "DIFFERENT (difference " in capsys.readouterr().out


def test_a_damaged_file_is_told_before_anything_is_measured(copied: Path, capsys: pytest.CaptureFixture[str]):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", "--model", str(copied)]) == 2
    assert "model.safetensors is damaged or cut short" in capsys.readouterr().err


def test_the_command_prints_both(whole: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(whole), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is True
    assert body["measured"] == pytest.approx(body["recorded"])
    assert "text" not in body


def test_another_text_is_measured_but_not_compared(whole: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--text", f"file:{text_file}", "--windows", "3", "--context", "16", "--split", "validation"]
    assert main(["verify", "--model", str(whole), *options]) == 0
    reported = capsys.readouterr().out
    assert "there is no comparison" in reported
    assert "validation split: 3 non-overlapping windows of 16 tokens" in reported


def test_the_same_text_elsewhere_is_compared(whole: Path, text: TextConfig, text_file: Path):
    assert Path(text.reference.removeprefix("file:")) != text_file
    result = verify(whole, text=TextConfig(f"file:{text_file}", context=32, test_windows=6))
    assert result.ok
    assert result.recorded is not None


def test_a_text_that_changed_since_is_told(copied: Path, text_file: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    _edit(copied, lambda body: body["measured"]["protocol"].update(text=f"file:{other}"))
    with pytest.raises(ConfigError, match=r"other\.txt has changed since the export: .* give one with --text"):
        verify(copied)


def test_what_fails_in_the_fresh_process_is_told_here(copied: Path, tmp_path: Path):
    _edit(copied, lambda body: body["measured"]["protocol"].update(text=f"file:{tmp_path / 'gone.txt'}"))
    with pytest.raises(ModelError, match=r"there is no file .*gone\.txt"):
        verify(copied)


def test_nothing_recorded_and_no_text_is_told(copied: Path):
    _edit(copied, lambda body: body.update(measured=None))
    with pytest.raises(ConfigError, match=r"no recorded perplexity .* \(--text\)"):
        verify(copied)


def test_windows_without_a_text_are_told(whole: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(whole), "--windows", "3"]) == 2
    assert "give it with --text" in capsys.readouterr().err


def test_a_folder_that_is_no_export_is_told(llama_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--model", str(llama_checkpoint)]) == 2
    assert "has no lowrank.json" in capsys.readouterr().err


def test_rounding_is_that_of_the_dtype():
    """A logit between 8 and 16 is rounded by at most the tolerance."""
    logits = torch.linspace(8, 15.9, 1000, dtype=torch.float64)
    for name in ("float32", "bfloat16", "float16"):
        rounded = logits.to(getattr(torch, name)).double()
        assert (rounded - logits).abs().max() <= tolerance_of(name)
    assert tolerance_of("float32") < 1e-6 < tolerance_of("bfloat16") < 0.07

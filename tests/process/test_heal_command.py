"""``lowrank heal``: from a folder to a folder, measured before and after, and going on where it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lowrank_core.cli import main
from lowrank_core.commands.heal import _check_same, _recovered
from lowrank_core.config import ModelSource
from lowrank_core.evaluation import evaluate
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.text import WindowSet


@pytest.fixture(scope="module")
def folder(llama_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "small"
    where = ["--model", str(llama_checkpoint), "--text", f"file:{text_file}", "--context", "32"]
    assert main(["compress", *where, "--windows", "8", "--preset", "pifa", "--compression-ratio", "0.5", "--out", str(out)]) == 0
    return out


def arguments(folder: Path, text_file: Path, out: Path, *more: str) -> list[str]:
    where = ["heal", "--model", str(folder), "--text", f"file:{text_file}", "--context", "32", "--windows", "8"]
    return [*where, "--steps", "24", "--validate-every", "4", "--batch-size", "4", "--out", str(out), "--json", *more]


def test_a_folder_is_healed_into_a_folder(folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "healed"
    assert main(arguments(folder, text_file, out)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["healing"]["kl_after"] < result["healing"]["kl_before"]
    assert result["healed"]["kl"] < result["one_shot"]["kl"]
    assert result["healed"]["dense_perplexity"] == result["one_shot"]["dense_perplexity"]
    assert result["healed"]["parameters"] == result["one_shot"]["parameters"]
    manifest = json.loads((out / "lowrank.json").read_text())
    assert manifest["made_from"] == json.loads((folder / "lowrank.json").read_text())["made_from"]
    assert manifest["ranks"] == json.loads((folder / "lowrank.json").read_text())["ranks"]
    assert manifest["healing"]["tokens"] == result["healing"]["tokens"] > 0
    assert manifest["measured"]["perplexity"] == pytest.approx(result["healed"]["perplexity"], rel=1e-6)
    card = (out / "README.md").read_text()
    assert "healed" in card
    assert load_model(ModelSource(str(out))).parameters == result["healed"]["parameters"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed"]  # no checkpoint is left
    assert main(["verify", "--model", str(out)]) == 0


def test_a_killed_healing_goes_on(folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = arguments(folder, text_file, tmp_path / "healed", "--patience", "99")
    killed = [*command, "--steps", "4000"]
    process = subprocess.Popen([sys.executable, "-m", "lowrank_core", *killed], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / ".healed.healing" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "healed").exists()
    assert main(command) == 2  # other settings: said, not mixed
    assert "belongs to another healing" in capsys.readouterr().err
    resumed = subprocess.Popen(
        [sys.executable, "-m", "lowrank_core", *killed], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True
    )
    assert resumed.stderr is not None
    line = next(line for line in resumed.stderr if "going on" in line)
    resumed.kill()
    resumed.wait()
    resumed.stderr.close()
    assert int(line.split("after step ")[1].split()[0]) >= 4


def test_what_is_no_export_is_refused(llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(arguments(llama_checkpoint, text_file, tmp_path / "out")) == 2
    assert "has no lowrank.json" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(arguments(llama_checkpoint, text_file, tmp_path / "taken")) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(("interval", "words"), [((0.5, 1.5), ", 75% of the one-shot loss recovered"), ((-0.1, 2.1), ""), (None, "")])
def test_a_loss_that_the_windows_do_not_tell_has_no_share(
    llama: ModelHandle, windows: WindowSet, interval: tuple[float, float] | None, words: str
):
    report = evaluate(llama, windows.first(2), against=llama)
    dense = report.dense_perplexity
    before = replace(report, perplexity=dense + 1.0, perplexity_difference_interval=interval)
    assert _recovered(before, replace(report, perplexity=dense + 0.25)) == words


def test_another_dense_model_than_the_folder_was_made_from_is_refused(
    folder: Path, llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = Path(shutil.copytree(llama_checkpoint, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] += 0.01  # a compressible weight: no tensor of the folder shows it
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(folder, text_file, tmp_path / "healed", "--against", str(other))) == 2
    assert "is not the model that the folder was made from. Give that one: --against MODEL." in capsys.readouterr().err
    assert not (tmp_path / "healed").exists()


def test_what_can_not_be_compared_is_a_warning(llama: ModelHandle):
    assert _check_same(llama.identity, llama) == ()
    (earlier,) = _check_same({}, llama)
    assert "earlier version" in earlier
    (rounded,) = _check_same({**llama.identity, "dtype": "bfloat16", "model": "0"}, llama)
    assert "--dtype bfloat16" in rounded

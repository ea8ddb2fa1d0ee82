"""Processes that we start find our package, and nothing in the folder that they work in: a run's folder may come from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from lowrank_core.config import ModelSource, RunConfig, TextConfig
from lowrank_core.export import verify
from lowrank_core.runs import client, create_run
from lowrank_core.runs.processes import python_command, python_environment
from lowrank_core.speed import SpeedConfig
from lowrank_core.speed.memory import measure_memory

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0
MARKER = "imported-from-the-working-directory"


def plant(folder: Path) -> Path:
    """Put modules into ``folder`` that leave a mark when they are imported; return where."""
    for name in ("json", "torch", "optuna", "psutil", "lowrank_core"):
        (folder / f"{name}.py").write_text(f"open({str(folder / MARKER)!r}, 'w').write({name!r})\n", encoding="utf-8")
    return folder / MARKER


@pytest.fixture(params=["as it is", "with empty and relative entries"])
def python_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH as many profiles leave it: an empty entry means the working directory."""
    if request.param != "as it is":
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", ""), ""]))


@pytest.mark.usefixtures("python_path")
def test_a_worker_imports_nothing_from_its_run(tmp_path: Path):
    run = create_run(RunConfig(ModelSource(str(tmp_path / "no-model")), TextConfig("file:none.txt")), path=tmp_path / "run")
    mark = plant(run.path)
    client.start_worker(run)
    deadline = time.monotonic() + PATIENCE
    while run.status().active and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not mark.exists(), run.log_tail()
    assert run.status().state == "failed", run.log_tail()  # it came up, and says that there is no model
    assert "no-model" in run.status().message


@pytest.mark.usefixtures("python_path")
def test_verification_imports_nothing_from_the_working_directory(llama_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch):
    from lowrank_core.cli import main

    out = tmp_path / "export"
    text = ["--text", f"file:{text_file}", "--context", "32", "--windows", "40"]
    assert main(["compress", "--model", str(llama_checkpoint), *text, "--compression-ratio", "0.2", "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    mark = plant(tmp_path)
    assert verify(out).ok
    assert not mark.exists()


@pytest.mark.usefixtures("python_path")
def test_measuring_memory_imports_nothing_from_the_working_directory(llama_checkpoint: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = plant(tmp_path)
    measure_memory(ModelSource(str(llama_checkpoint)), SpeedConfig(prompt_tokens=4, new_tokens=2, rounds=1, warmup=1))
    assert not mark.exists()


def test_what_a_process_starts_is_as_careful(tmp_path: Path):
    """Streamlit or a harness may start further interpreters by itself: they inherit it."""
    mark = plant(tmp_path)
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import json, lowrank_core.errors'], check=True)"
    subprocess.run(python_command("-c", code), check=True, cwd=tmp_path, env=python_environment())
    assert not mark.exists()


def test_the_environment_keeps_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "some/place", str(tmp_path)]))
    monkeypatch.setenv("OTHER", "kept")
    result = python_environment(OMP_NUM_THREADS="3")
    assert result["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(Path.cwd() / "some" / "place"), str(tmp_path)]
    assert (result["OTHER"], result["OMP_NUM_THREADS"], result["PYTHONSAFEPATH"]) == ("kept", "3", "1")


def test_one_place_alone_starts_interpreters():
    """A process that is started elsewhere would search the working directory again."""
    paths = [*ROOT.glob("lowrank_core/**/*.py"), *ROOT.glob("pages/**/*.py"), ROOT / "app.py", *ROOT.glob("assets/*.py")]
    result = [
        str(path.relative_to(ROOT)) for path in paths if re.search(r"sys\.executable|\bmultiprocessing\b", path.read_text(encoding="utf-8"))
    ]
    assert result == ["lowrank_core/runs/processes.py"]

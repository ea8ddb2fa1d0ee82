"""What must survive: workers killed at any moment, a dashboard killed next to them, a disk that fills up."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.runs import Run, client, create_run
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.worker.main import run_worker

PATIENCE = 180.0


@pytest.fixture
def config(llama_checkpoint: Path, text_file: Path) -> RunConfig:
    return RunConfig(
        model=ModelSource(str(llama_checkpoint)),
        text=TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=24, test_windows=6),
        calibration=CalibrationConfig(group_size=8),
        search=SearchConfig(compression_ratio=0.3, trials=3, startup_trials=3, confirmed=0),
    )


def _until(condition: Callable[[], object], what: str, run: Run) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"did not {what}: {run.status()}\n{run.log_tail(60)}"
        time.sleep(0.02)


def _complete(run: Run) -> dict[int, TrialRecord]:
    return {trial.number: trial for trial in read_trials(run) if trial.state == "complete"}


def _start_from_a_dashboard(run: Run) -> subprocess.Popen[bytes]:
    """Start the worker as a page does, from a process that then stays."""
    lines = [
        "import time",
        "from lowrank_core.runs import client, open_run",
        f"client.start_worker(open_run({str(run.path)!r}))",
        "time.sleep(600)",
    ]
    code = "\n".join(lines)
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.slow
def test_twenty_kills_lose_no_trial_that_was_complete(config: RunConfig):
    """Of the worker, of a further worker, of the dashboard that started them, or of all at once; at random moments."""
    assert config.search is not None
    run = create_run(replace(config, search=replace(config.search, trials=4000, sampler="random")))
    dice = random.Random(0)
    seen: dict[int, TrialRecord] = {}
    for turn in range(20):
        dashboard = _start_from_a_dashboard(run)
        before = len(seen)
        _until(lambda: run.worker_alive() and run.status().state == "running", "come up", run)
        victims = dice.choice(["worker", "helper", "dashboard", "all"])
        if turn and victims in ("helper", "all"):
            _until(lambda: run.status().stage.startswith("Searching"), "search", run)
            client.add_worker(run)
            _until(run.further_workers, "have a further worker", run)
        if turn % 2:  # in the middle of trials, else while it prepares
            _until(lambda before=before: len(_complete(run)) > before, "complete a trial", run)
        time.sleep(dice.uniform(0, 0.5))
        pids = {"worker": [run.status().pid], "helper": [w.pid for w in run.further_workers().values()], "dashboard": []}
        pids["all"] = [*pids["worker"], *pids["helper"]]
        for pid in pids[victims]:
            if pid is not None and psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        dashboard.kill()
        dashboard.wait()
        if victims in ("worker", "all"):
            _until(lambda: run.status().state == "interrupted", "be seen as dead", run)
        now = _complete(run)
        assert {number: now[number] for number in seen} == seen
        seen = now
        client.terminate(run)
        _until(lambda: run.status().state in ("interrupted", "stopped", "new"), "end", run)
    run.change_search(trials=len(_complete(run)) + 3)
    client.start_worker(run)
    _until(lambda: run.status().state == "idle", "finish", run)
    trials = read_trials(run)
    client.terminate(run)
    assert {number: trial for number, trial in _complete(run).items() if number in seen} == seen
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert {trial.state for trial in trials} <= {"complete", "failed"}
    assert "Traceback" not in run.log_tail(10**6)


def _limited(run: Run, size: int) -> subprocess.CompletedProcess[str]:
    """Run the worker where no file may grow beyond ``size`` bytes: to a program a disk that is full."""
    return subprocess.run(
        [sys.executable, "-m", "lowrank_core", "worker", "--run", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_full_disk_is_told_and_nothing_is_lost(config: RunConfig):
    run = create_run(config)
    run_worker(run, verbose=False)
    before = _complete(run)
    assert len(before) == 3
    run.change_search(trials=30)
    ended = _limited(run, run.journal.stat().st_size + 3000)
    assert ended.returncode == 2
    assert "can't write" in ended.stderr
    assert "Free some space" in ended.stderr
    assert "Traceback" not in ended.stderr
    status = run.status()
    assert status.state == "failed"
    assert "Free some space" in status.message
    run.change_search(trials=8)
    run_worker(run, verbose=False)
    assert {number: _complete(run)[number] for number in before} == before
    assert len(_complete(run)) == 8


def test_a_home_that_can_not_be_written_to_is_told(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    environment = {**os.environ, "LOWRANK_HOME": "/proc/nowhere"}  # not even the administrator may write there
    source = ["--model", config.model.reference, "--text", config.text.reference, "--context", "32", "--windows", "40"]
    for extra in (["search", *source, "--compression-ratio", "0.3", "--run", "/proc/nowhere/run"], ["analyze", *source]):
        ended = subprocess.run([sys.executable, "-m", "lowrank_core", *extra], capture_output=True, text=True, check=False, env=environment)
        assert ended.returncode == 2, ended.stderr
        assert "can't write" in ended.stderr
        assert "/proc/nowhere" in ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr

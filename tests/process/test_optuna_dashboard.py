"""optuna-dashboard opens our studies, by the command that the page shows."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.runs import create_run
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.storage import dashboard_command
from lowrank_core.worker.main import run_worker

pytest.importorskip("optuna_dashboard")
PATIENCE = 90.0


def _get(url: str) -> object:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            assert time.monotonic() < deadline, f"{url} did not answer"
            time.sleep(0.2)


def test_optuna_dashboard_shows_the_trials_with_readable_attributes(llama_checkpoint: Path, text_file: Path):
    run = create_run(
        RunConfig(
            model=ModelSource(str(llama_checkpoint)),
            text=TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6),
            calibration=CalibrationConfig(group_size=8),
            search=SearchConfig(compression_ratio=0.3, trials=5, confirmed=0),
        )
    )
    run_worker(run, verbose=False)
    program, *arguments = shlex.split(dashboard_command(run))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name(program)), *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        studies = _get(f"http://127.0.0.1:{port}/api/studies")
        (study,) = studies["study_summaries"]  # type: ignore[index,call-overload]
        assert study["study_name"] == run.study_name
        shown = _get(f"http://127.0.0.1:{port}/api/studies/{study['study_id']}?after=0")
    finally:
        process.kill()
        process.wait()
    trials = shown["trials"]  # type: ignore[index,call-overload]
    ours = read_trials(run)
    assert [trial["values"] for trial in trials] == [[trial.value] for trial in ours]
    for shown_trial, trial in zip(trials, ours, strict=True):
        attributes = {entry["key"]: entry["value"] for entry in shown_trial["user_attrs"]}
        assert {"ranks", "compression_ratio", "kl", "perplexity", "seconds", "tokens", "worker"} <= set(attributes)
        assert json.loads(attributes["ranks"]) == dict(trial.ranks)
        assert float(attributes["kl"]) == trial.kl
        assert int(attributes["tokens"]) == 4 * 31

"""Record the run that an opening without any run shows: a real search on the bundled model, measured on test text.

    python assets/record_run.py              # all of it: more than an hour on two cores
    python assets/record_run.py --describe   # only what the model is made of, from the model itself; nothing is measured

It writes `assets/recorded-run`: the run directory as a worker leaves it, without logs, locks and exported weights.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lowrank_core.config import ModelSource, RunConfig
from lowrank_core.config.evaluation import Sampling
from lowrank_core.models import describe, load_model
from lowrank_core.models.attention import find_heads
from lowrank_core.presets.recipes import DEFAULT_PRESET, search_by
from lowrank_core.runs import create_run, write_json
from lowrank_core.runs.client import TEMPERATURE, submit
from lowrank_core.studies import requests
from lowrank_core.studies.records import best_trial, read_trials
from lowrank_core.studies.space import BASELINES
from lowrank_core.studio.shared.model_refs import PRESET_KEYS
from lowrank_core.worker.main import run_worker

RATIO = 0.4
PROMPT = "def read_lines(path):\n"
SOURCE = PROMPT + "    with open(path) as lines:\n        return [line.strip() for line in lines if line]\n"
"""Read token by token: of our own, as no text of others is in the repository."""
OTHER_TEXT = "file:docs/methods.md"
COMPARED = ("uniform", "preset:svd_llm")
TARGET = Path(__file__).resolve().parent / "recorded-run"
LEFT_OUT = ("worker.log", "worker.lock", "study.lock", "workers", "requests", "exports", "paused")


def describe_again() -> None:
    """Write model.json again, of the same model: an earlier version did not say all that this one does."""
    path = TARGET / "model.json"
    handle = load_model(ModelSource("demo"))
    now = {**describe(handle), **find_heads(handle).describe()}
    before = json.loads(path.read_text(encoding="utf-8"))
    assert before["fingerprint"] == now["fingerprint"], "another model: record the run again"
    write_json(path, now)


def main() -> None:
    if "--describe" in sys.argv[1:]:
        describe_again()
        return
    os.chdir(Path(__file__).resolve().parents[1])  # so that the second text has a name, and no path of this machine
    with tempfile.TemporaryDirectory() as home:
        os.environ["LOWRANK_HOME"] = home
        config = RunConfig(search=replace(search_by(DEFAULT_PRESET, RATIO), trials=30))
        run = create_run(config, name=f"demo on python-stdlib, {RATIO:.0%} removed (recorded)", path=Path(home) / "runs" / "recorded-run")
        run_worker(run)
        best = best_trial(read_trials(run))
        assert best is not None
        for trial in (*BASELINES, *PRESET_KEYS):  # the best trials were measured when the search was done
            submit(run, requests.CompareRequest(trial), launch=False)
        for trial in (best.number, *COMPARED):
            submit(run, requests.OtherTextRequest(trial, OTHER_TEXT), launch=False)
            submit(run, requests.GenerateRequest(trial, PROMPT, Sampling(temperature=TEMPERATURE)), launch=False)
            submit(run, requests.TokensRequest(trial, SOURCE), launch=False)
        submit(run, requests.SpeedRequest(best.number), launch=False)
        submit(run, requests.HealRequest(best.number), launch=False)
        submit(run, requests.SensitivityRequest(), launch=False)
        run_worker(run)  # nothing is left to search: it answers the requests, then measures what each module costs
        for name in LEFT_OUT:
            path = run.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_json(run.path / "run.json", run.record | {"recorded": True})
        write_json(run.path / "text.json", (run.part("text") or {}) | {"preview": ""})  # no text of others in the repository
        for path in (run.path / "results").glob("*.json"):
            path.write_text(path.read_text().replace(f"{run.path}/", ""))  # a healed model's folder, which is left out
        run.journal.write_text(run.journal.read_text().replace(f'"{socket.gethostname()}:', '"recorder:'))  # no name of a machine
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(run.path, TARGET)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()

"""Calibration by two processes: what one measures alone, to rounding."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from families import built

from lowrank_core.cli import main
from lowrank_core.runs.processes import python_command, python_environment
from lowrank_core.statistics.moments import InputStatistics, OutputStatistics
from lowrank_core.statistics.store import StoredStatistics

pytestmark = pytest.mark.process

COMMAND = (
    "-m",
    "lowrank_core",
    "compress",
    "--windows",
    "19",
    "--group-size",
    "4",
    "--context",
    "16",
    "--batch-size",
    "4",
    "--test-windows",
    "2",
)
KINDS = {"inputs": InputStatistics, "outputs": OutputStatistics}


def compress(home: Path, model: Path, text_file: Path, *, processes: int) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)) if processes > 1 else ()
    source = ("--model", str(model), "--text", f"file:{text_file}", "--compression-ratio", "0.3", "--out", str(home / "out"))
    environment = python_environment(LOWRANK_HOME=str(home), OMP_NUM_THREADS="1")
    done = subprocess.run(
        python_command(*launcher, *COMMAND, *source), env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Wrote") == 1


def statistics(home: Path, part: str) -> StoredStatistics:
    folder = next(path.parent for path in home.glob(f"statistics/*/{part}"))
    return StoredStatistics(folder, part, KINDS[part])  # type: ignore[arg-type,type-var]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3n_text"])
def test_two_processes_measure_what_one_does(family: str, tmp_path: Path, text_file: Path, sample_text: str) -> None:
    """Chained blocks, experts, and whole passes."""
    model = save_checkpoint(tmp_path / "model", built(family), sample_text)
    homes = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, home in homes.items():
        compress(home, model, text_file, processes=processes)
    for part in KINDS:
        one, two = (statistics(home, part) for home in homes.values())
        assert one.name == two.name
        assert list(one) == list(two)
        for name in one:
            for field in vars(one[name]):
                expected, result = (torch.as_tensor(getattr(each[name], field), dtype=torch.float64) for each in (one, two))
                gap = torch.linalg.vector_norm(result - expected)
                assert gap <= 1e-12 * torch.linalg.vector_norm(expected), (name, field)


def test_what_calibrates_nothing_is_not_started_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"evaluate runs in one process\. Only analyze and compress can be started by torchrun\."):
        main(["evaluate", "--model", "demo", "--text", "python-stdlib"])

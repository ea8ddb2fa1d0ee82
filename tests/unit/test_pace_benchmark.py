"""``lowrank benchmark pace``: rows of stages, builds side by side, and what can go wrong with an earlier one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lowrank_core.cli import main
from lowrank_core.commands.benchmarks import pace
from lowrank_core.commands.benchmarks.pace import BuildPace, PaceRow, markdown_of
from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.config.benchmarks import PaceBenchmark
from lowrank_core.errors import ConfigError, RunError

TOLD = {"Calibrating": {"cpu_seconds": 6.0, "seconds": 4.0}, "Factorising by Studio": {"cpu_seconds": 3.0, "seconds": 2.0}}


def _build(name: str, stages: dict[str, dict[str, float]], cpu_seconds: float, perplexity: float | None = 12.5) -> BuildPace:
    return BuildPace(name, pace._rows(stages, cpu_seconds, 10.0), 2**30, 2**20, 2**10, perplexity)


def test_what_is_in_no_stage_is_the_rest():
    rows = pace._rows(TOLD, 10.0, 8.0)
    assert [row.stage for row in rows] == ["Calibrating", "Factorising", "the rest", "in all"]
    assert [row.cpu_seconds for row in rows] == [6.0, 3.0, 1.0, 10.0]
    assert [row.seconds for row in rows] == [4.0, 2.0, 2.0, 8.0]
    assert [row.stage for row in pace._rows({}, 10.0, 8.0)] == ["in all"]


def test_a_build_that_tells_no_stages_is_compared_by_its_totals():
    builds = [pace._in_units(build, 2.0) for build in (_build("this build", TOLD, 10.0), _build("v0", {}, 25.0, None))]
    lines = markdown_of(2.0, builds).splitlines()
    assert "| Calibrating | 3.00 F, 6.0 CPU s, 4.0 s | – | – |" in lines
    assert "| in all | 5.00 F, 10.0 CPU s, 10.0 s | 12.50 F, 25.0 CPU s, 10.0 s | 2.50 |" in lines
    assert "v0: peak memory 1.0 GiB, 1.0 MiB written, 1.0 KiB kept, perplexity on test text not told." in lines
    assert lines[-1] == "Peak memory of v0 over this build: 1.00."


def test_one_build_has_no_ratio():
    assert "ratio of" not in markdown_of(2.0, [_build("this build", TOLD, 10.0)])


def test_medians_are_over_the_turns():
    runs = [_build("this build", TOLD, seconds) for seconds in (10.0, 30.0, 11.0)]
    assert pace._middle(runs).row("in all") == PaceRow("in all", 11.0, 10.0, 0.0)


def test_builds_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    order: list[str] = []

    def run(build: str, tree: Path, arguments: list[str]) -> BuildPace:
        order.append(build)
        assert arguments[0] == "compress"
        assert f"--model={tmp_path}" in arguments
        assert {"--calibration-windows=7", "--context=32", "--compression-ratio=0.3", "--preset=svd_llm"} <= set(arguments)
        return _build(build, TOLD, 10.0)

    monkeypatch.setattr(pace, "_run", run)
    monkeypatch.setattr(pace, "_forward", lambda source, text: 2.0)
    monkeypatch.setattr(pace, "_git", lambda *arguments: None)
    monkeypatch.chdir(tmp_path.parent)
    config = PaceBenchmark(compression_ratio=0.3, preset="svd_llm", against="HEAD", turns=2)
    forward, builds = pace.pace_table(ModelSource(tmp_path.name), TextConfig("python-stdlib", context=32, calibration_windows=7), config)
    assert forward == 2.0
    assert order == ["this build", "HEAD", "HEAD", "this build"]
    assert [build.build for build in builds] == ["this build", "HEAD"]
    assert builds[0].rows[0].forwards == 3.0


def test_an_unknown_revision_is_told_in_a_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="Give a revision of the checkout"), pace._trees("no-such-revision"):
        pass
    words = ["benchmark", "pace", "--model", "demo", "--text", "python-stdlib", "--compression-ratio", "1.5"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_failed_build_said_last_is_told(tmp_path: Path):
    with pytest.raises(RunError, match=r"compress of v0 failed: lowrank: unrecognized arguments: --no-such-flag"):
        pace._run("v0", pace._ROOT, ["compress", "--no-such-flag"])


def test_the_memory_of_a_process_is_its_own():
    """What started it may hold more: a child's ru_maxrss begins there on Linux."""
    large = bytearray(300 * 2**20)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        watch = pace._Watch(psutil.Process(process.pid))
        watch.start()
        while not watch.peak:
            watch.ended.wait(0.01)
        process.communicate(b"\n")
    watch.ended.set()
    watch.join()
    assert 0 < watch.peak < len(large) // 2

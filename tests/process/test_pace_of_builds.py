"""``lowrank benchmark pace`` on a tiny model, next to the build of the last commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_core.cli import main

pytestmark = pytest.mark.process


def test_stages_of_two_builds_are_measured(llama_checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ["--windows", "8", "--context", "32", "--test-windows", "4", "--compression-ratio", "0.3"]
    words = ["benchmark", "pace", "--model", str(llama_checkpoint), "--text", f"file:{text_file}", *sizes, "--against", "HEAD", "--json"]
    assert main(words) == 0
    body = json.loads(capsys.readouterr().out)
    assert [build["build"] for build in body["builds"]] == ["this build", "HEAD"]
    this, head = body["builds"]
    assert {"Calibrating", "Factorising", "Compressing", "Writing and measuring"} <= {row["stage"] for row in this["rows"]}
    for build in (this, head):
        assert build["rows"][-1]["stage"] == "in all"
        assert build["rows"][-1]["forwards"] == pytest.approx(build["rows"][-1]["cpu_seconds"] / body["forward_cpu_seconds"])
        assert build["peak_bytes"] > 2**26
        assert build["written_bytes"] >= build["kept_bytes"] > 0
    assert this["perplexity"] == pytest.approx(head["perplexity"])

"""Splits are cut apart by position; where a text says the same thing twice, what is held out was seen, and that is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.config import ModelSource, RunConfig, TextConfig
from lowrank_core.models import ModelHandle
from lowrank_core.runs import create_run
from lowrank_core.studio.overview.text_facts import text_facts
from lowrank_core.text import WindowSet, load_text, overlap_warnings
from lowrank_core.text.overlap import repeated_share
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.session import prepare


@pytest.fixture
def repeated(tmp_path: Path, sample_text: str) -> str:
    """A file of one page, ten times."""
    path = tmp_path / "repeated.txt"
    path.write_text("\n".join([sample_text[:4000]] * 10), encoding="utf-8")
    return f"file:{path}"


def test_the_share_is_that_of_the_runs_that_were_seen():
    tokens = torch.randint(0, 10**6, (4, 40), generator=torch.Generator().manual_seed(0))
    seen = WindowSet("text", "calibration", tokens[:2], bos=False, available_tokens=80)
    shifted = torch.cat([tokens[0, 8:], tokens[2, :8]])  # 17 of its 25 runs lie in the first window
    held_out = replace(seen, split="test", ids=torch.stack([shifted, tokens[3]]))
    assert repeated_share(held_out, [seen]) == 17 / 50
    assert repeated_share(replace(held_out, ids=tokens[2:]), [seen]) == 0
    (warning,) = overlap_warnings(seen, held_out)
    assert warning.startswith("34% of the test text is in the calibration windows, too")


def test_bos_is_no_part_of_a_run():
    tokens = torch.randint(1, 10**6, (2, 20), generator=torch.Generator().manual_seed(0))
    first = torch.cat([torch.zeros(2, 1, dtype=torch.int64), tokens], dim=1)
    seen = WindowSet("text", "calibration", first, bos=True, available_tokens=40)
    assert repeated_share(WindowSet("text", "test", tokens, bos=False, available_tokens=40), [seen]) == 1


def test_a_text_that_does_not_repeat_itself_has_no_warning(llama: ModelHandle, text_file: Path):
    windows = load_text(TextConfig(f"file:{text_file}", context=32), llama.tokenizer)
    assert overlap_warnings(windows.calibration, windows.validation, windows.test) == ()


def test_a_run_on_a_text_that_repeats_itself_says_so(llama_checkpoint: Path, repeated: str):
    run = create_run(RunConfig(ModelSource(str(llama_checkpoint)), TextConfig(repeated, context=32)))
    session = prepare(run, Reporter(run))
    facts = text_facts(run)
    assert facts is not None
    assert [warning.partition(" text ")[0].partition(" of the ")[2] for warning in facts.warnings] == ["validation", "test"]
    assert session.notes[-2:] == facts.warnings


def test_compress_on_a_text_that_repeats_itself_says_so(
    llama_checkpoint: Path, repeated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["compress", "--model", str(llama_checkpoint), "--text", repeated, "--context", "32", "--compression-ratio", "0.3"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert any(
        "of the test text is in the calibration windows, too" in warning for warning in json.loads(capsys.readouterr().out)["warnings"]
    )

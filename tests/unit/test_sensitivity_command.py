"""``lowrank sensitivity``: in a new run, in one that is there, and again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_core.cli import main
from lowrank_core.commands.sensitivity import _lines
from lowrank_core.config import ModelSource, RunConfig, TextConfig
from lowrank_core.runs import Run, bundled_path, client, create_run, open_run
from lowrank_core.sensitivity.config import MODULE
from lowrank_core.sensitivity.records import SensitivityCell, read_records


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["sensitivity", *map(str, arguments)]) == status
    result = capsys.readouterr()
    return result.out, result.err


def test_a_run_is_made_measured_and_gone_on_with(
    llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    source = ["--model", llama_checkpoint, "--text", f"file:{text_file}", "--context", 32, "--windows", 4]
    out, _ = printed(capsys, *source, "--run", folder, "--kinds", "q_proj", "--kept", 0.5, "--json")
    body = json.loads(out)
    assert out.count("\n") == 1
    assert (body["measured"], [cell["scope"] for cell in body["cells"]]) == (3, ["type", "module", "module"])
    assert body["setting"]["windows"] == 4
    assert (folder / body["file"]).is_file()
    assert [cell["kl"] for cell in body["cells"]] == [cell.kl for cell in read_records(open_run(folder))[0].cells]

    out, _ = printed(capsys, "--run", folder, "--kinds", "q_proj", "--kept", 0.5, 0.3, "--basis", "pooled_feature")
    assert "all of a type, kept" in out
    assert "30%" in out
    assert "3 cells measured now, 6 in" in out
    assert "validation split: 4 non-overlapping windows" in out

    _, err = printed(capsys, *source, "--run", folder, status=2)
    assert "is a run with a model and a text of its own" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "where to measure? Give --run DIR, or --model M and --text T"),
        (["--model", "demo"], "give --model and --text together"),
        (["--run", "nowhere"], "is no run"),
        (["--run", "nowhere", "--kept", "1.5"], "a kept ratio must lie between 0 and 1"),
        (["--run", str(bundled_path("assets", "recorded-run"))], "a recording that ships with the package"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str):
    _, err = printed(capsys, *arguments, status=2)
    assert said in err
    assert err.count("\n") == 1


def test_a_run_with_a_worker_is_left_to_it(
    llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = create_run(RunConfig(model=ModelSource(str(llama_checkpoint)), text=TextConfig(f"file:{text_file}")), path=tmp_path / "run")
    monkeypatch.setattr(Run, "worker_alive", lambda self: True)
    out, _ = printed(capsys, "--run", run.path, "--kept", 0.4)
    assert "has a worker, which measures when its trials are done" in out
    (request,) = client.pending_requests(run)
    assert request["arguments"]["kept"] == [0.4]


def test_a_module_that_diverged_is_the_most_sensitive():
    cells = [SensitivityCell(MODULE, name, 0.125, 4, 1, 10, 80, kl, None, None, 1.0) for name, kl in (("a", 0.1), ("b", None), ("c", 0.2))]
    head, *rows = _lines(tuple(cells))
    assert head == "the most sensitive modules at 12.5% kept, each alone:"
    assert [row.split() for row in rows] == [["b", "diverged"], ["c", "0.2"], ["a", "0.1"]]

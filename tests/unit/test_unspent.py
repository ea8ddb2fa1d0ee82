"""Ranks in multiples leave a part of the budget: by how much is said wherever the model is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import models, single

from lowrank_core.allocation import allocate, round_ranks_down, unspent_parameters, unspent_warning, unspent_words
from lowrank_core.cli import main
from lowrank_core.errors import BudgetError, ConfigError
from lowrank_core.export import read_manifest
from lowrank_core.parameters import Unit, budget_for_ratio, budget_of
from lowrank_core.runs import open_run
from lowrank_core.studio.report import report_html


@settings(max_examples=100, deadline=None)
@given(models(size=120), st.floats(0.05, 0.8), st.integers(1, 16))
def test_what_is_unspent_is_said_exactly_or_not_at_all(units: tuple[Unit, ...], ratio: float, multiple: int):
    try:
        exact = allocate("uniform", units, ratio)
    except (BudgetError, ConfigError):
        return
    result = round_ranks_down(exact, units, multiple)
    left, budget = unspent_parameters(units, ratio, result), budget_for_ratio(units, ratio)
    assert left == budget - result.parameters >= 0
    warning = unspent_warning(units, ratio, result, multiple)
    assert bool(warning) == (multiple > 1 and left > 0.01 * budget)
    if warning:
        assert warning[0].startswith(f"{left:,} of the budget's {budget:,} parameters")
        assert f"multiples of {multiple}" in warning[0]
        assert f"{result.compression_ratio:.1%} is removed where {ratio:.1%} was asked for" in warning[0]


def test_a_ratio_and_a_count_give_the_budget_of_the_units():
    units = [single("a"), single("b", 30, 90, bias=True)]
    assert budget_of(64 * 64 + 30 * 91, 0.3) == budget_for_ratio(units, 0.3)
    assert unspent_words(1000, 990, 2000, 0.5, 8) == ()
    assert "11 of the budget's 1,000 parameters (1.1%)" in unspent_words(1000, 989, 2000, 0.5, 8)[0]


# --- where it is said ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(llama_checkpoint: Path, text_file: Path) -> list[str]:
    return ["--model", str(llama_checkpoint), "--text", f"file:{text_file}", "--context", "32", "--windows", "40"]


def test_compress_says_it_on_the_terminal_in_the_json_and_on_the_card(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--preset", "bolaco", "--compression-ratio", "0.3", "--out", str(tmp_path / "out"), "--json"]
    assert main(["compress", *source, *options]) == 0
    captured = capsys.readouterr()
    body = json.loads(captured.out)
    budget = budget_of(body["compressible_parameters_before"], 0.3)
    left = budget - body["compressible_parameters_after"]
    assert body["unspent_parameters"] == left > 0.01 * budget
    (words,) = [warning for warning in body["warnings"] if "are not spent" in warning]
    assert words.startswith(f"{left:,} of the budget's {budget:,} parameters")
    assert f"warning: {words}" in captured.err
    assert words in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert words in read_manifest(tmp_path / "out").details["warnings"]


def test_compress_without_rounding_says_nothing_and_counts_what_is_left(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--preset", "svd", "--compression-ratio", "0.3", "--out", str(tmp_path / "out"), "--json"]
    assert main(["compress", *source, *options]) == 0
    body = json.loads(capsys.readouterr().out)
    assert 0 <= body["unspent_parameters"] < 48  # the cheapest step
    assert body["warnings"] == []
    assert "Warnings" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_search_says_it_in_its_status_report_json_and_export(source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "run"
    options = ["--preset", "bolaco", "--compression-ratio", "0.2", "--trials", "4", "--run", str(config), "--json"]
    status = main(["search", *source, *options])
    captured = capsys.readouterr()
    run = open_run(config)
    (before,) = [warning for warning in run.status().warnings if "are not spent" in warning]
    assert before.startswith("With uniform ranks, ")
    assert "are not spent" in report_html(run)
    if status == 0:  # a published search may end without a trial within its bounds
        body = json.loads(captured.out)
        reported = [warning for warning in body["warnings"] if "are not spent" in warning]
        assert bool(reported) == (body["unspent_parameters"] > 0.01 * budget_of(21_504, 0.2))
        assert read_manifest(Path(body["export"])).details["warnings"] == reported

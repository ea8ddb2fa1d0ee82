"""`lowrank benchmark dashboard`: what it writes, what it counts, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lowrank_core.cli import main
from lowrank_core.config import RunConfig, SearchConfig
from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs import Run, create_run, recorded_run
from lowrank_core.speed import Spread
from lowrank_core.studies.records import read_trials
from lowrank_core.studies.replay import Replay
from tests.benchmarks import browser, dashboard
from tests.benchmarks.browser import PageLoad


def recorded() -> Run:
    result = recorded_run()
    assert result is not None
    return result


def test_a_replay_copies_complete_trials_in_their_order_and_begins_again() -> None:
    source = [trial for trial in read_trials(recorded()) if trial.finished]
    run = create_run(RunConfig(search=SearchConfig(trials=100)))
    replay = Replay.begin(recorded(), run)
    assert read_trials(run) == []
    replay.add(len(source) + 1)
    copies = read_trials(run)
    assert [trial.number for trial in copies] == list(range(len(source) + 1))
    assert [(trial.label, trial.value, trial.ranks) for trial in copies[:-1]] == [(t.label, t.value, t.ranks) for t in source]
    assert copies[-1].value == source[0].value
    assert copies[0].windows == source[0].windows


def test_a_run_without_trials_can_not_be_replayed() -> None:
    empty, target = (create_run(RunConfig(search=SearchConfig()), path=None) for _ in range(2))
    with pytest.raises(RunError, match="no study to replay"):
        Replay.begin(empty, target)


def test_replaying_leaves_the_recorded_run_as_it_was() -> None:
    before = {path: path.stat().st_mtime_ns for path in recorded().path.iterdir()}
    Replay.begin(recorded(), create_run(RunConfig(search=SearchConfig()))).add(3)
    assert {path: path.stat().st_mtime_ns for path in recorded().path.iterdir()} == before


def test_charts_are_told_from_tables_and_named_by_their_keys() -> None:
    identifier = b"$$ID-" + b"0" * 32 + b"-scree"
    plotly = b"\x0a" + bytes([len(identifier)]) + identifier + b'R\x10{"data":[],"layout":{}}'
    table = b'{"metadata": {"encoding": "UTF-8"}}'
    frames = browser.Frames.__new__(browser.Frames)
    frames.received = [plotly, table, b'{"layer": [{"mark": "point"}]}']
    assert frames.figures() == [(len(plotly), "scree"), (len(frames.received[2]), "")]
    assert frames.bytes == len(plotly) + len(table) + len(frames.received[2])


def test_without_playwright_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(ConfigError, match="pip install 'playwright"), browser.chromium():
        pass


def test_without_a_browser_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright.sync_api")
    monkeypatch.setattr(browser.shutil, "which", lambda name: "/nowhere/chromium")
    with pytest.raises(ConfigError, match="playwright install chromium"), browser.chromium():
        pass


class Stalled:
    """A page that never comes to rest, as far as ``load`` can tell."""

    def __init__(self, runs: list[list[float | None]]) -> None:
        self.runs = runs

    def goto(self, address: str, wait_until: str) -> None:
        pass

    def wait_for_function(self, condition: str) -> None:
        from playwright.sync_api import Error

        raise Error("Timeout 180000ms exceeded.")

    def evaluate(self, expression: str) -> list[list[float | None]]:
        return self.runs


@pytest.mark.parametrize(("runs", "why"), [([], "never ran"), ([[1.0, None]], "has not ended"), ([[1.0, 2.0]], "a chart is missing")])
def test_a_page_that_stalls_is_named_with_what_it_waits_for(runs: list[list[float | None]], why: str) -> None:
    pytest.importorskip("playwright.sync_api")
    frames = browser.Frames.__new__(browser.Frames)
    frames.received = []
    with pytest.raises(RunError, match=f"/spectra was not drawn: .*{why}"):
        browser.load(Stalled(runs), frames, "http://127.0.0.1:9/spectra")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["--rounds", "--updates", "--trials"])
def test_counts_below_one_are_refused_by_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "dashboard", option, "0"]) == 2
    assert f"{option[2:]} must be 1 or more, got 0" in capsys.readouterr().err


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(RunError, match="no such thing"), browser.serving(command, home=tmp_path, log=tmp_path / "log"):
        pass


def test_the_live_run_is_one_that_this_process_works_on(tmp_path: Path) -> None:
    run, replay = dashboard._live_run(tmp_path, recorded(), 5, 40)
    status = run.status()
    assert (status.state, status.pid, run.config.search and run.config.search.trials) == ("running", os.getpid(), 40)
    assert len(read_trials(run)) == 5
    replay.add()
    assert len(read_trials(run)) == 6
    assert all((run.path / name).exists() for name in ("model.json", "text.json", "calibration.json", "spectra.npz"))


def test_the_tables_stand_beside_the_empty_page_and_carry_the_protocol() -> None:
    load = PageLoad("Spectra", 0.5, 2.0, 80_000, 75, 13_000, 12_000, "scree", 5)
    empty = PageLoad("Empty", 0.25, 0.5, 500, 5, 400, 0, "", 0)
    row = dashboard._load_row("http://127.0.0.1:9/spectra", [load, load], [empty, empty])
    assert row.against_empty.median == 4.0
    tick = dashboard.TickRow("Spectra", "/spectra", Spread(2000, 1000, 3000), Spread(1, 1, 2), None)
    blank = dashboard._load_row("http://127.0.0.1:9/", [empty], [empty])
    report = dashboard.DashboardReport("2 rounds", 1.5, load, blank, [row], [tick])
    text = dashboard.as_markdown(report)
    assert (
        "| Spectra | 0.50 (0.50 to 0.50) | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) | 80.0 kB | 75 | 5 | 12.0 kB (scree) | 13.0 kB |"
        in text
    )
    assert "| Spectra | 2.0 kB (1.0 kB to 3.0 kB) | 1 (1 to 2) | – |" in text
    assert text.endswith("Protocol: 2 rounds.")
    assert json.loads(json.dumps(report.to_mapping()))["pages"][0]["largest_figure"] == 12_000


@pytest.mark.slow
@pytest.mark.browser
def test_every_page_is_measured_and_no_chart_is_large() -> None:
    pytest.importorskip("playwright.sync_api")
    try:
        report = dashboard.measure_dashboard(rounds=1, updates=2, trials=10)
    except ConfigError as error:
        if os.environ.get("LOWRANK_REQUIRE_BROWSER"):
            raise
        pytest.skip(str(error))
    assert len(report.loads) == len(report.ticks) >= 5
    assert all(0 < row.sizes.first_content <= row.sizes.complete for row in report.loads)
    assert all(row.sizes.largest_figure <= row.sizes.largest_message < 1_000_000 for row in report.loads)
    assert any(row.sizes.charts for row in report.loads)
    assert max(row.bytes.high for row in report.ticks) > 0
    assert report.empty.sizes.bytes < min(row.sizes.bytes for row in report.loads)

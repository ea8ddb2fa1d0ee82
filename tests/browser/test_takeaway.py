"""Taking a model away in a real browser: what is downloaded can be read, and a written model proves itself."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from xml.etree import ElementTree

import pytest
from synthetic import make_run, write_answers, write_rich_study
from test_dashboard import CALIBRATION_SECONDS, TRIAL_SECONDS, assert_sound, console_errors, wait_for
from test_report_file import drawn

from lowrank_core.config import CompressionConfig, ExportConfig, RunConfig, SearchConfig, TextConfig
from lowrank_core.runs import client, create_run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import best_trial, read_trials
from lowrank_core.studio.export.export_list import written_models

pytestmark = pytest.mark.browser


@pytest.fixture
def finished(home):
    run = make_run(study=write_rich_study)
    write_answers(run)
    return run


def fetched(page, button: str):
    """Press a button and return the file that comes."""
    with page.expect_download() as loading:
        page.get_by_role("button", name=button).click()
    return loading.value


def test_everything_that_is_downloaded_can_be_read(finished, address, page, tmp_path):
    page.goto(f"{address}/export?run={finished.id}&trial=3")
    page.get_by_role("heading", name="Export", level=1).wait_for()
    page.get_by_role("button", name="Comparison (CSV)").wait_for()

    allocation = json.loads(fetched(page, "Allocation (JSON)").path().read_text())
    assert set(allocation) >= {"ranks", "compression_ratio", "parameters"}
    rows = list(csv.DictReader(io.StringIO(fetched(page, "Trials (CSV)").path().read_text())))
    assert [row["trial"] for row in rows] == [str(number) for number in range(10)]
    compared = list(csv.DictReader(io.StringIO(fetched(page, "Comparison (CSV)").path().read_text())))
    assert [row["form"] for row in compared] == ["dense", "one-shot", "one-shot"]
    assert {row["protocol"] for row in compared} == {"python-stdlib, test split, 4 windows of 32 tokens"}
    report, figures = (fetched(page, name) for name in ("Report (HTML)", "Charts (SVG, PNG, HTML)"))
    assert (report.suggested_filename, figures.suggested_filename) == ("report.html", "charts.html")
    report.save_as(tmp_path / "report.html")
    figures.save_as(tmp_path / "figures.html")
    assert_sound(page)

    page.context.set_offline(True)
    named = "[...document.querySelectorAll('.plot')].map((plot) => plot.id)"
    count = drawn(page, tmp_path / "report.html")
    reported = page.evaluate(named)
    assert count == len(reported) >= 4
    assert {"scree", "history"} <= set(reported)
    assert drawn(page, tmp_path / "figures.html") == count
    assert page.evaluate(named) == reported
    figure = page.locator("figure", has=page.locator("#history"))
    for kind, is_one in (("SVG", is_svg), ("PNG", lambda content: content.startswith(b"\x89PNG"))):
        with page.expect_download() as loading:
            figure.get_by_role("button", name=kind).click()
        assert loading.value.suggested_filename == f"history.{kind.lower()}"
        assert is_one(loading.value.path().read_bytes())
    assert console_errors(page) == []


def is_svg(content: bytes) -> bool:
    root = ElementTree.fromstring(content)
    return root.tag.endswith("svg") and len(list(root.iter())) > 50


@pytest.mark.slow
def test_a_model_is_written_and_proves_itself(address, page, home):
    text = TextConfig(context=64, calibration_windows=8, validation_windows=4, test_windows=4)
    compression = CompressionConfig(basis="whitened", storage="pivoted", value_dense=False)
    search = SearchConfig(compression_ratio=0.3, trials=2, confirmed=0, compression=compression)
    run = create_run(RunConfig(text=text, search=search))
    client.start_worker(run)
    wait_for(lambda: run.status().state == "idle", CALIBRATION_SECONDS, "the search ends")
    page.goto(f"{address}/export?run={run.id}")
    page.locator(".st-key-export_quantization input").click()
    page.get_by_role("option", name="int8").click()
    page.get_by_text("-int8:").first.wait_for(state="attached")
    page.get_by_role("button", name="Write it").click()
    entry = page.locator(".st-key-written_0")
    entry.get_by_role("button", name="Reload and measure again").click(timeout=TRIAL_SECONDS * 1000)
    entry.get_by_text("Passed: equal up to rounding").wait_for(timeout=TRIAL_SECONDS * 1000)
    entry.get_by_text("4 non-overlapping windows of 64 tokens").first.wait_for()
    (written,) = written_models(run, results(run))
    assert written.quantization == "int8"
    best = best_trial(read_trials(run))
    assert best is not None
    assert written.path.name == ExportConfig(quantization="int8").folder_name(best.label)
    with page.expect_download() as loading:
        entry.get_by_role("button", name="Folder (.zip").click()
    with zipfile.ZipFile(loading.value.path()) as archive:
        assert archive.testzip() is None
        assert f"{written.path.name}/model.safetensors" in archive.namelist()
    assert_sound(page)
    assert console_errors(page) == []

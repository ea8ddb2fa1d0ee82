"""The report in a real browser, opened as a file: figures are drawn, nothing is loaded, light and dark and paper are readable."""

from __future__ import annotations

import time

import pytest
from synthetic import make_run, write_answers, write_rich_study

from lowrank_core.report import write_report
from lowrank_core.runs import recorded_run, write_json

pytestmark = pytest.mark.browser

EVIL = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"


def wait_for(page, condition: str, seconds: float = 20.0) -> None:
    """Wait for a condition; the page's policy forbids Playwright's own way, which evaluates a string inside the page."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def drawn(page, path) -> int:
    """Open the report and return how many figures are drawn."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    wait_for(page, "document.querySelectorAll('.plot').length === document.querySelectorAll('.plot.js-plotly-plot').length")
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    return page.evaluate("[...document.querySelectorAll('.plot')].filter((plot) => plot.querySelector('svg.main-svg')).length")


def ink(page) -> str:
    return page.evaluate("getComputedStyle(document.querySelector('#scree .xtick text')).fill")


def test_the_recorded_run_is_drawn_from_a_file_in_light_dark_and_on_a_narrow_screen(page, home, tmp_path):
    path = tmp_path / "report.html"
    write_report(recorded_run(), path)
    assert drawn(page, path) == page.locator(".plot").count() == 9
    page.emulate_media(color_scheme="dark")
    wait_for(page, "getComputedStyle(document.querySelector('#scree .xtick text')).fill === 'rgb(228, 233, 236)'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 27)"
    page.emulate_media(color_scheme="light")
    wait_for(page, "getComputedStyle(document.querySelector('#scree .xtick text')).fill === 'rgb(29, 39, 48)'")
    page.set_viewport_size({"width": 400, "height": 800})
    wait_for(page, "document.querySelector('#scree svg.main-svg').getBoundingClientRect().width < 400")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    with page.expect_download() as loading:
        page.get_by_role("link", name="Data (CSV)").first.click()
    assert loading.value.suggested_filename == "modules.csv"
    assert page.errors == []


def test_paper_is_light_and_holds_what_is_folded(page, home, tmp_path):
    path = tmp_path / "report.html"
    write_report(recorded_run(), path)
    page.emulate_media(color_scheme="dark")
    drawn(page, path)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert ink(page) == "rgb(29, 39, 48)"
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert ink(page) == "rgb(228, 233, 236)"
    assert page.locator("details[open]").count() == 0
    assert page.errors == []


def test_nothing_from_a_file_runs(page, home, tmp_path):
    run = make_run(study=write_rich_study)
    write_answers(run)
    write_json(run.path / "run.json", {**run.record, "name": EVIL})
    model = run.part("model") or {}
    layers = [{**layer, "name": f"{layer['name']}{EVIL}"} for layer in model["layers"]]
    write_json(run.path / "model.json", {**model, "layers": layers, "architecture": EVIL})
    write_json(run.path / "results" / "9.json", {"ok": False, "kind": "export", "error": EVIL})
    for trial_file in run.path.glob("study.journal"):
        trial_file.write_text(trial_file.read_text().replace("_proj", f"_proj{EVIL}"))
    path = tmp_path / "report.html"
    write_report(run, path)
    assert drawn(page, path) == page.locator(".plot").count() > 0
    page.locator("#history .points path").first.hover(force=True)
    assert page.evaluate("window.ran") is None
    assert page.locator("h1").inner_text() == EVIL
    assert page.errors == []

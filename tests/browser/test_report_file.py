"""The report in a real browser, opened as a file: figures are drawn, nothing is loaded, light and dark and paper are readable."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from synthetic import make_run, write_answers, write_rich_study

from lowrank_core.runs import recorded_run, write_json
from lowrank_core.studio.report import write_report

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


def ink(page, figure: str = "scree") -> str:
    return page.evaluate(f"getComputedStyle(document.querySelector('#{figure} .xtick text')).fill")


def saved(page, figure: str, kind: str, folder: Path) -> Path:
    """Press a button under a figure, and return the file that comes."""
    with page.expect_download() as loading:
        page.locator("figure", has=page.locator(f"#{figure}")).get_by_role("button", name=kind).click()
    assert loading.value.suggested_filename == f"{figure}.{kind.lower()}"
    path = folder / loading.value.suggested_filename
    loading.value.save_as(path)
    return path


def test_the_recorded_run_is_drawn_from_a_file_in_light_dark_and_on_a_narrow_screen(page, home, tmp_path):
    path = tmp_path / "report.html"
    write_report(recorded_run(), path)
    assert drawn(page, path) == page.locator(".plot").count() == 12
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


def test_a_figure_is_saved_as_an_interactive_page_of_its_own(page, home, tmp_path):
    path = tmp_path / "report.html"
    write_report(recorded_run(), path)
    drawn(page, path)
    reported = "[...document.querySelectorAll('figure:has(#history) :is(figcaption, .under > span)')].map((part) => part.textContent)"
    named = "document.querySelector('#history').getAttribute('aria-label')"
    points = "document.querySelectorAll('#history .points path').length"
    policy = "document.querySelector('meta[http-equiv=Content-Security-Policy]').content"
    wanted = [page.evaluate(part) for part in (reported, named, points, policy)]
    assert wanted[2] == 30
    alone = saved(page, "history", "HTML", tmp_path)
    assert alone.stat().st_size < 6_000_000

    assert drawn(page, alone) == page.locator("figure").count() == 1
    assert [page.evaluate(part) for part in (reported, named, points, policy)] == wanted
    assert page.title() == "Every trial on search-validation text · demo on python-stdlib, 40% removed (recorded) · low-rank studio"
    assert page.locator("header p").inner_text().startswith("From: Report of a run of low-rank studio")
    page.locator("#history .points path").last.hover(force=True)
    page.locator("#history .hovertext").first.wait_for()
    assert page.locator("button.download").all_inner_texts() == ["SVG", "PNG"]
    assert saved(page, "history", "SVG", tmp_path).read_text().startswith("<svg")
    assert ink(page, "history") == "rgb(29, 39, 48)"
    page.emulate_media(color_scheme="dark")
    wait_for(page, "getComputedStyle(document.querySelector('#history .xtick text')).fill === 'rgb(228, 233, 236)'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 27)"
    page.set_viewport_size({"width": 400, "height": 800})
    wait_for(page, "document.querySelector('#history svg.main-svg').getBoundingClientRect().width < 400")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
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
    assert drawn(page, saved(page, "history", "HTML", tmp_path)) == 1
    page.locator("#history .points path").first.hover(force=True)
    assert page.evaluate("window.ran") is None
    assert page.locator("h1").inner_text() == EVIL
    assert page.errors == []

"""The dashboard in a real browser: what only a browser can tell."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from synthetic import make_run, running_status, write_answers, write_study

from lowrank_core.config import RunConfig, TextConfig
from lowrank_core.runs import create_run, list_runs

pytestmark = pytest.mark.browser

PAGES = {
    "Overview": "/",
    "Spectra": "/spectra",
    "Feature energy": "/energy",
    "Sensitivity": "/sensitivity",
    "Manual allocation": "/manual",
    "Rank search": "/search",
    "Compare": "/compare",
    "Export": "/export",
}
COUNT = re.compile(r"(\d+) of (\d+) trials complete")
# Opened below the root, Streamlit's own front end asks there first for two files that are at the root.
PROBES = ("/_stcore/health", "/_stcore/host-config")
# It asks for the address of each download when it draws the button: in vain where the page is being left. Whether downloads work is
# tested by downloading.
DOWNLOADS = "/media/"
CALIBRATION_SECONDS, TRIAL_SECONDS, QUEUE_SECONDS = 900, 400, 1200  # upper bounds for a busy machine


def console_errors(page) -> list[tuple[str, str]]:
    return [(text, url) for text, url in page.errors if not url.endswith(PROBES) and DOWNLOADS not in f"{url} {text}"]


def assert_sound(page) -> None:
    """No traceback and no error box."""
    for test_id in ("stException", "stAlertContentError"):
        boxes = page.get_by_test_id(test_id)
        assert boxes.count() == 0, boxes.first.inner_text()


def trials(page) -> int:
    """Return how many trials the page says are complete."""
    result = COUNT.search(page.get_by_text(COUNT).first.inner_text())
    assert result
    return int(result[1])


def wait_for(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.25)


def open_page(page, name: str) -> None:
    page.get_by_role("link", name=name, exact=False).first.click()
    page.get_by_role("heading", name=name, level=1).wait_for()


@pytest.mark.slow
def test_a_search_streams_in_survives_a_reload_stops_resumes_and_is_compared(address, page, home):
    text = TextConfig(context=128, calibration_windows=64, validation_windows=16, test_windows=16)
    page.goto(f"{address}/search?run={create_run(RunConfig(text=text)).id}")
    page.get_by_role("heading", name="Rank search", level=1).wait_for()
    page.get_by_role("button", name="Start search").click()

    worker = page.get_by_test_id("stSidebar")
    worker.get_by_role("button", name="Stop").wait_for()
    page.get_by_text(re.compile(r"^0 of \d+ trials complete")).wait_for()
    page.evaluate("window.sameDocument = true")
    wait_for(lambda: trials(page) >= 3, CALIBRATION_SECONDS, "three trials on the page")
    assert page.evaluate("window.sameDocument") is True
    assert_sound(page)

    page.reload()
    page.get_by_text(COUNT).wait_for()
    seen = trials(page)
    assert seen >= 3
    wait_for(lambda: trials(page) > seen, TRIAL_SECONDS, "a further trial after the reload")

    worker.get_by_role("button", name="Stop").click()
    worker.get_by_role("button", name="Resume").wait_for(timeout=TRIAL_SECONDS * 1000)
    page.reload()  # the trial under way when the stop was asked for is complete, and may not be on the page yet
    page.get_by_text(COUNT).wait_for()
    stopped = trials(page)
    time.sleep(4)
    page.reload()
    page.get_by_text(COUNT).wait_for()
    assert trials(page) == stopped

    worker.get_by_role("button", name="Resume").click()
    wait_for(lambda: trials(page) > stopped, TRIAL_SECONDS, "a further trial after resuming")
    worker.get_by_role("button", name="Stop").click()
    worker.get_by_role("button", name="Resume").wait_for(timeout=TRIAL_SECONDS * 1000)

    open_page(page, "Compare")
    page.get_by_role("button", name="Measure on test text").click()
    page.get_by_text("Perplexity, compressed").wait_for(timeout=TRIAL_SECONDS * 1000)
    page.get_by_role("radio", name="Continuations").or_(page.get_by_text("Continuations", exact=True)).first.click()
    page.get_by_role("button", name="Continue with all chosen").click()
    page.get_by_text("Compressed, ").wait_for(timeout=QUEUE_SECONDS * 1000)  # behind the models being measured

    for name in PAGES:
        open_page(page, name)
        page.wait_for_timeout(1500)
        assert_sound(page)
    assert console_errors(page) == []
    (run,) = (run for run in list_runs() if run.config.search is not None)
    wait_for(lambda: run.status().state == "stopped", QUEUE_SECONDS, "all requests are answered, and the search is as it was left")


@pytest.fixture
def finished(home):
    """A finished run, there before the server starts."""
    run = make_run()
    write_answers(run)
    return run


def test_every_page_opens_by_its_address_without_errors(finished, address, page):
    for name, path in PAGES.items():
        page.goto(address + path)
        page.get_by_role("heading", name=name, level=1).wait_for()
        page.get_by_test_id("stSidebar").get_by_text("done").wait_for()
        page.wait_for_timeout(1500)
        assert_sound(page)
    assert console_errors(page) == []


def test_nothing_is_fetched_from_elsewhere(finished, address, page):
    elsewhere = []
    page.on(
        "request", lambda request: elsewhere.append(request.url) if not request.url.startswith((address, "data:", "blob:", "ws:")) else None
    )
    for path in PAGES.values():
        page.goto(address + path)
        page.get_by_role("heading", level=1).wait_for()
        page.wait_for_timeout(1500)
    assert elsewhere == []


def test_a_click_in_the_map_picks_the_module_everywhere(finished, address, page):
    page.goto(f"{address}/spectra")
    plot = page.locator(".st-key-spectra_map .nsewdrag").first
    plot.wait_for()
    page.wait_for_timeout(1000)
    box = plot.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 1.5 / 7)  # block 1 of 3, second of seven rows: k
    module = "model.layers.1.self_attn.k_proj"
    page.wait_for_url(re.compile(re.escape(f"module={module}")))
    page.get_by_text(f"Spectra of {module}").wait_for()
    open_page(page, "Feature energy")
    page.get_by_label(f"Cumulative energy kept of features and weights of {module} against rank").first.wait_for(state="attached")
    assert module in page.url


def test_a_click_on_a_trial_shows_its_allocation(finished, address, page):
    page.goto(f"{address}/search")
    page.get_by_text("Where Trial 3 keeps its parameters").wait_for()
    point = page.locator(".st-key-history path[aria-label^='Trial 2,']").first
    point.wait_for(state="attached")
    page.wait_for_timeout(1000)
    box = point.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_text("Where Trial 2 keeps its parameters").wait_for()
    assert "trial=2" in page.url


@pytest.fixture
def searching(home):
    """A run whose search is under way, as far as the dashboard can tell: its worker is a process that only sleeps."""
    run = make_run(state="running")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"]) as sleeper:
        run.write_status(running_status(pid=sleeper.pid))
        yield run
        sleeper.kill()


def test_zoom_is_kept_while_trials_stream_in(searching, address, page):
    page.goto(f"{address}/search")
    page.get_by_text("5 of 6 trials complete").wait_for()
    plot = page.locator(".st-key-history .background").first
    plot.wait_for(state="attached")
    page.wait_for_timeout(1500)

    def ticks() -> list[str]:
        return page.locator(".st-key-history .role-axis-label text").all_text_contents()

    before = ticks()
    plot.evaluate("plot => plot.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(500)
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.7)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    moved = ticks()
    assert moved != before
    write_study(searching)
    page.get_by_text("10 of 6 trials complete").wait_for()
    page.wait_for_timeout(2500)
    assert ticks() == moved
    assert console_errors(page) == []


def test_downloads_can_be_read(finished, address, page):
    page.goto(f"{address}/search")
    with page.expect_download() as download:
        page.get_by_role("button", name="Allocation (JSON)").click()
    ranks = json.loads(download.value.path().read_text())["ranks"]
    assert ranks["model.layers.0.self_attn.v_proj"] is None
    with page.expect_download() as download:
        page.get_by_role("button", name="Trials (CSV)").click()
    assert download.value.path().read_text().splitlines()[0].startswith("trial,state,kind,value")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system(finished, address, page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    page.get_by_role("heading", name="Overview", level=1).wait_for()
    background = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    assert background == {"light": "rgb(252, 252, 250)", "dark": "rgb(17, 22, 27)"}[scheme]

"""Every page of the navigation in light and dark, wide and narrow; links, tabs and keys. One server for all tests here."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from routes import ROUTES
from synthetic import make_run, running_status, write_answers, write_study
from test_dashboard import console_errors

from lowrank_core.runs import recorded_run
from tests.benchmarks.browser import load, watched

Error = pytest.importorskip("playwright.sync_api").Error
pytestmark = pytest.mark.browser

MODULE = "model.layers.1.self_attn.k_proj"
BACKGROUND = {"light": "rgb(252, 252, 250)", "dark": "rgb(17, 22, 27)"}
MIN_CONTRAST = {"axes": 4.5, "notes": 3.0}  # WCAG 2.1 AA: text, and large or bold text
LAYOUT_SECONDS = 5

BEYOND = """() => {
  const main = document.querySelector('[data-testid="stMain"]');
  if (main.scrollWidth <= main.clientWidth && document.documentElement.scrollWidth <= innerWidth) return [];
  return [...main.querySelectorAll('[data-testid]')].filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
    .map((element) => `${element.dataset.testid} ${element.textContent.slice(0, 40)}`);
}"""
"""Where the page can be moved sideways: what reaches over the right edge of the window."""

CUT_LINKS = """() => [...document.querySelectorAll('[data-testid="stMain"] :is(a, button) *')]
  .filter((element) => element.checkVisibility() && getComputedStyle(element).textOverflow === 'ellipsis')
  .filter((element) => element.scrollWidth > element.clientWidth + 1).map((element) => element.textContent)"""
"""Words of links and buttons that end in three dots."""

CUT = """() => [...document.querySelectorAll('.main-svg text, .stVegaLiteChart svg text')].filter((text) => {
  const chart = text.closest('[data-testid="stPlotlyChart"], [data-testid="stVegaLiteChart"]').getBoundingClientRect();
  const own = text.getBoundingClientRect();
  return text.checkVisibility() && own.width && (own.left < chart.left - 2 || own.right > chart.right + 2);
}).map((text) => text.textContent)"""
"""Words of charts that their edge cuts; not those in a closed panel."""

CONTRASTS = """() => {
  const parsed = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => Number(part) / 255);
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  const page = parsed(getComputedStyle(document.querySelector('.stApp')).backgroundColor);
  const contrast = (text) => {
    const style = getComputedStyle(text), share = Number(style.fillOpacity);
    const seen = light(parsed(style.fill).map((part, i) => share * part + (1 - share) * page[i]));
    return (Math.max(seen, light(page)) + 0.05) / (Math.min(seen, light(page)) + 0.05);
  };
  const all = (query) => [...document.querySelectorAll(query)].map((text) => [contrast(text), text.textContent]);
  return {
    axes: all('[class$="tick"] text, text[class$="title"], .role-axis-label text, .role-axis-title text'),
    notes: all('.annotation-text, .role-mark text'),
  };
}"""
"""Contrast to the page, and words: of axes, and of what is written into charts."""


@pytest.fixture(scope="module")
def site(tmp_path_factory, serving):
    """A server over two finished runs, and an older one that seems to be searching."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"]) as sleeper:
        patch.setenv("LOWRANK_HOME", str(folder / "home"))
        live = make_run(state="running")
        live.write_status(running_status(pid=sleeper.pid))
        older, newer = make_run(), make_run()
        for run in (older, newer):
            write_answers(run)
        with serving(folder / "streamlit.log") as address:
            yield SimpleNamespace(address=address, older=older, newer=newer, live=live)
        sleeper.kill()


@pytest.fixture
def show(site, visitor):
    """Open a view in a session of its own and wait until all of it is drawn: ``show("/search?run=…", scheme="dark")``."""

    def shown(view: str, **window):
        page = visitor(**window)
        page.frames_seen = watched(page)
        page.set_default_timeout(120_000)
        load(page, page.frames_seen, site.address + view)
        return page

    return shown


def go(page, address: str) -> None:
    """Open ``address`` in the same window, as a reload would, and wait until all of it is drawn."""
    load(page, page.frames_seen, address)


def out_of_sight(page) -> list[str]:
    """Return what can't be seen without moving the page sideways, once everything has taken its width."""
    for query in (BEYOND, CUT, CUT_LINKS):
        with contextlib.suppress(Error):
            page.wait_for_function(f"() => ({query})().length === 0", timeout=LAYOUT_SECONDS * 1000)
    return [words for query in (BEYOND, CUT, CUT_LINKS) for words in page.evaluate(query)]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", BACKGROUND)
def test_every_page_can_be_read(site, show, scheme, width):
    run = recorded_run().id  # where there is something to see on every page
    page, problems = show(f"/?run={run}", scheme=scheme, width=width), []
    for route in ROUTES:
        go(page, f"{site.address}{route.path}?run={run}")
        assert page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor") == BACKGROUND[scheme]
        contrasts = page.evaluate(CONTRASTS)
        for kind, minimum in MIN_CONTRAST.items():
            problems += [(route.title, f"{contrast:.1f}", words) for contrast, words in contrasts[kind] if contrast < minimum]
        problems += [(route.title, words) for words in out_of_sight(page)]
    assert problems == []
    assert console_errors(page) == []


def test_a_link_restores_run_module_and_trial_in_a_fresh_session(site, show):
    query = f"?run={site.older.id}&module={MODULE}&trial=2"
    page = show(f"/{query}")
    for route in ROUTES:
        go(page, site.address + route.path + query)
        assert page.url == site.address + route.path + query
    page = show(f"/spectra{query}")
    page.get_by_text(f"Spectra of {MODULE}").wait_for()
    page.get_by_role("link", name=re.compile("Rank search")).first.click()
    page.get_by_text("Where Trial 2 keeps its parameters").wait_for()
    assert page.url == f"{site.address}/search{query}"


def test_two_tabs_follow_one_run_and_keep_their_own_choices(site, show):
    first, second = show(f"/search?run={site.live.id}"), show(f"/search?run={site.live.id}&trial=2")
    second.get_by_text("Where Trial 2 keeps its parameters").wait_for()
    for tab in (first, second):
        tab.get_by_text("5 of 6 trials complete").wait_for()
        tab.evaluate("window.sameDocument = true")
    write_study(site.live)
    for tab in (first, second):
        tab.get_by_text("10 of 6 trials complete").wait_for()
        assert tab.evaluate("window.sameDocument") is True
    first.get_by_text("Where Trial 3 keeps its parameters").wait_for()
    assert "trial=" not in first.url
    second.get_by_text("Where Trial 2 keeps its parameters").wait_for()
    assert "trial=2" in second.url
    second.get_by_role("link", name=re.compile("Spectra")).first.click()
    second.get_by_role("heading", name="Spectra", level=1).wait_for()
    assert first.get_by_role("heading", name="Rank search", level=1).is_visible()


def test_a_module_is_picked_by_keys_alone(site, show):
    page = show(f"/spectra?run={site.newer.id}")
    within = "() => document.activeElement.matches('.st-key-module_picker [role=combobox]')"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(within):
            break
    assert page.evaluate(within), "Tab does not reach the module picker"
    page.keyboard.press("ArrowDown")
    page.get_by_role("option").first.wait_for()
    page.keyboard.type("layers.1.self_attn.k")
    page.get_by_role("option", name=MODULE).wait_for()
    page.keyboard.press("Enter")
    page.get_by_text(f"Spectra of {MODULE}").wait_for()
    page.wait_for_url(re.compile(f"module={re.escape(MODULE)}"))

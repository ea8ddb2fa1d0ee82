"""The dashboard in headless Chromium: a server of its own, and what a page load sends and takes."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_core.errors import ConfigError, RunError
from lowrank_core.runs.processes import python_environment

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["Frames", "PageLoad", "Server", "chromium", "load", "opened", "page_links", "redraws", "serving", "watched"]

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
_MISSING = (
    "`lowrank benchmark dashboard` needs {what}. Install both with: python -m pip install 'playwright>=1.50', then "
    "playwright install chromium (or your system's package `chromium`)."
)
_START_SECONDS, _PAGE_SECONDS = 120, 180
_QUIET = 400  # milliseconds without a change, after which a page counts as drawn
_KEY = re.compile(rb"\$\$ID-[0-9a-f]{32}-")

_INSTRUMENT = f"""
window.lowrank = {{runs: [], first: null, since: null}};
new MutationObserver(() => {{
  const seen = window.lowrank, state = document.querySelector('[data-test-script-state]')?.dataset.testScriptState;
  const running = state === 'running', last = seen.runs.at(-1), now = performance.now();
  if (seen.first === null && document.querySelector('h1')) seen.first = now;
  if (running && (!last || last[1] !== null)) seen.runs.push([now, null]);
  if (!running && last && last[1] === null) last[1] = now;
}}).observe(document, {{subtree: true, childList: true, attributes: true, attributeFilter: ['data-test-script-state']}});
window.lowrank.drawn = () => {{
  const seen = window.lowrank, now = performance.now(), last = seen.runs.at(-1), all = (query) => [...document.querySelectorAll(query)];
  const done = seen.first !== null && last && last[1] !== null && !all('[data-testid="stSkeleton"]').length
    && all('[data-testid="stPlotlyChart"]').every((chart) => chart.querySelector('.main-svg'))
    && all('[data-testid="stVegaLiteChart"]').every((chart) => chart.querySelector('svg, canvas'));
  seen.since = done ? (seen.since ?? now) : null;
  return seen.since !== null && now - seen.since > {_QUIET} && [seen.first, seen.since];
}};
"""
"""Notes when the title appears and when the script runs; ``drawn`` tells since when the page is complete."""


@dataclass(frozen=True)
class Server:
    """A Streamlit server: its address, and the seconds from its start until it was healthy."""

    address: str
    seconds: float


@dataclass(frozen=True)
class PageLoad:
    """One opening of a page by its address, in a new session of a browser that has the front end in its cache.

    Attributes:
        title: the page's own.
        first_content: seconds from the navigation until the title is there.
        complete: until the script is done and every chart is drawn.
        bytes, messages: what came over the WebSocket.
        largest_message: bytes of the largest of them: one element with its data.
        largest_figure: bytes of the largest chart: its JSON and, in Vega-Lite, its rows; 0 without charts.
        figure: which chart that is.
        charts: how many there are.
    """

    title: str
    first_content: float
    complete: float
    bytes: int
    messages: int
    largest_message: int
    largest_figure: int
    figure: str
    charts: int


class Frames:
    """What a page received over its WebSockets."""

    def __init__(self, page: Page) -> None:
        self.received: list[bytes] = []
        page.on("websocket", lambda socket: socket.on("framereceived", self._note))

    def _note(self, payload: str | bytes) -> None:
        self.received.append(payload.encode() if isinstance(payload, str) else payload)

    @property
    def bytes(self) -> int:
        return sum(map(len, self.received))

    def figures(self) -> list[tuple[int, str]]:
        """Return bytes and key of every chart."""
        result = [frame for frame in self.received if b'"layout":{' in frame or b'"mark":' in frame]
        return [(len(frame), _key(frame)) for frame in result]


def _key(message: bytes) -> str:
    """Return the key of the element in ``message``: the end of its id, whose length stands before it (protocol buffers)."""
    result = _KEY.search(message)
    if result is None:
        return ""
    return message[result.end() : result.start() + message[result.start() - 1]].decode("ascii", "replace")


@contextmanager
def serving(command: list[str], *, home: Path, log: Path, cwd: Path | None = None) -> Iterator[Server]:
    """Start ``command``, to which a free port is added, with ``home`` as LOWRANK_HOME; end it afterwards.

    Raises:
        RunError: it ends at once, or does not answer.
    """
    port = _free_port()
    quiet = {"STREAMLIT_SERVER_HEADLESS": "true", "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false", "STREAMLIT_SERVER_ADDRESS": "127.0.0.1"}
    environment = python_environment(**quiet, LOWRANK_HOME=str(home))
    began = time.perf_counter()
    with log.open("wb") as stream:
        server = subprocess.Popen([*command, str(port)], stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=cwd)
    try:
        _wait_until_healthy(port, server, log)
        yield Server(f"http://127.0.0.1:{port}", time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.05)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise RunError(f"the dashboard did not start: {said[-1] if said else 'it said nothing'}. Does `lowrank dashboard` start by itself?")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start headless Chromium, the system's or playwright's own.

    Raises:
        ConfigError: playwright or a browser is not installed.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise ConfigError(_MISSING.format(what="playwright, which is not installed")) from error
    path = next((result for name in _CHROMIUM if (result := shutil.which(name))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        except Error as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(_MISSING.format(what=f"a Chromium that starts ({reason})")) from error
        try:
            yield browser
        finally:
            browser.close()


def watched(page: Page) -> Frames:
    """Have ``page`` note when it is drawn, from the next opening on; return what it receives."""
    page.add_init_script(_INSTRUMENT)
    page.set_default_timeout(_PAGE_SECONDS * 1000)
    return Frames(page)


def load(page: Page, frames: Frames, address: str) -> PageLoad:
    """Open ``address`` in a page that is ``watched``, and wait until it is drawn.

    Raises:
        RunError: it is not drawn in time, or shows an error.
    """
    from playwright.sync_api import Error

    frames.received.clear()
    try:
        page.goto(address, wait_until="commit")
        first, complete = page.wait_for_function("() => window.lowrank.drawn()").json_value()
    except Error as error:
        raise RunError(f"{address} was not drawn: {_why(page, error)}. Open it with `lowrank dashboard` to see more.") from error
    if page.get_by_test_id("stException").count():
        raise RunError(f"{address} shows an error. Open it with `lowrank dashboard` to see which.")
    figures = frames.figures()
    largest, name = max(figures, default=(0, ""))
    return PageLoad(
        title=page.locator("h1").first.inner_text(),
        first_content=first / 1000,
        complete=complete / 1000,
        bytes=frames.bytes,
        messages=len(frames.received),
        largest_message=max(map(len, frames.received)),
        largest_figure=largest,
        figure=name,
        charts=len(figures),
    )


def _why(page: Page, error: Exception) -> str:
    """Return what a page that was not drawn in time waits for, else the first line of ``error``."""
    from playwright.sync_api import Error

    try:
        runs: list[list[float | None]] = page.evaluate("window.lowrank.runs")
    except Error:
        return str(error).strip().splitlines()[0].rstrip(".")
    ended = bool(runs) and runs[-1][1] is not None
    return "a chart is missing" if ended else "its script has not ended" if runs else "its script never ran"


def opened(page: Page, address: str) -> str:
    """Open ``address`` in a page that is ``watched``, whether it comes to rest or not; return its title."""
    page.goto(address, wait_until="commit")
    page.wait_for_function("() => window.lowrank.first !== null && window.lowrank.runs.some((run) => run[1] !== null)")
    return page.locator("h1").first.inner_text()


def redraws(page: Page) -> list[float]:
    """Return the seconds of every run of the script that this opening has seen end."""
    result: list[float] = page.evaluate("window.lowrank.runs.filter((run) => run[1] !== null).map((run) => (run[1] - run[0]) / 1000)")
    return result


def page_links(page: Page) -> list[str]:
    """Return the addresses of all pages, in the order of the navigation."""
    links = page.get_by_test_id("stSidebarNavLink")
    links.first.wait_for(state="attached")
    result: list[str] = links.evaluate_all("links => links.map(link => link.href.split('?')[0])")
    return result

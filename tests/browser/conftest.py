"""A dashboard on a free port with a home of its own, and headless Chromium to drive it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowrank_core.runs import client, list_runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "ui"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
START_SECONDS = 240


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _serving(log: Path) -> Iterator[str]:
    """Serve the dashboard on LOWRANK_HOME; yield its address."""
    port = _free_port()
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py"), "--server.port", str(port), "--server.headless", "true"]
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=dict(os.environ)) as server,
    ):
        try:
            _wait_until_healthy(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)
            for run in list_runs():
                client.terminate(run)


def _wait_until_healthy(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(START_SECONDS * 4):
        assert server.poll() is None, "the dashboard ended at once"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.25)
    pytest.fail(f"the dashboard was not healthy after {START_SECONDS} s")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("LOWRANK_HOME", str(folder))
    return folder


@pytest.fixture
def address(home, tmp_path):
    """The dashboard's address; ask for ``home`` first to put runs into it."""
    with _serving(tmp_path / "streamlit.log") as result:
        yield result


@contextmanager
def _chromium() -> Iterator[Browser]:
    """Start the system's Chromium; skip the test where there is none."""
    if CHROMIUM is None:
        if os.environ.get("LOWRANK_REQUIRE_BROWSER"):
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield started
        finally:
            started.close()


def _noting_errors(opened: Page) -> Page:
    opened.set_default_timeout(120_000)
    opened.errors = []
    opened.on(
        "console",
        lambda message: opened.errors.append((message.text, message.location.get("url", ""))) if message.type == "error" else None,
    )
    opened.on("pageerror", lambda error: opened.errors.append((str(error), "")))
    return opened


@pytest.fixture
def page():
    """A page of a fresh browser that notes every error of the console."""
    with _chromium() as started:
        yield _noting_errors(started.new_page(viewport={"width": 1280, "height": 900}))


@pytest.fixture(scope="module")
def browser():
    """A browser for all tests of a module; not to be used next to ``page``."""
    with _chromium() as started:
        yield started


@pytest.fixture
def visitor(browser):
    """Open a window in a session of its own, as another person would: ``visitor(scheme="dark", width=400)``."""
    contexts = []

    def opened(scheme: str = "light", width: int = 1280) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        return _noting_errors(contexts[-1].new_page())

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def serving():
    """Serve the dashboard on LOWRANK_HOME for as long as a block lasts: ``with serving(log) as address``."""
    return _serving

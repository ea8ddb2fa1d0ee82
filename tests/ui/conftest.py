"""A home of its own for every test, and runs to put into it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import streamlit as st
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

from lowrank_core.runs import RunStatus

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home, and no recorded run unless a test makes one."""
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: None)
    # No test starts a process: a worker that is asked for is seen as queued.
    monkeypatch.setattr("lowrank_core.runs.client._launch", lambda run: run.write_status(RunStatus("queued", "Starting the worker")))
    st.cache_resource.clear()
    return tmp_path / "home"


class NoPagesFolder(type(Path())):
    """Before every run AppTest looks again for a folder `pages`, and a run that finds it skips app.py; a server looks only once."""

    def exists(self, **options) -> bool:
        return False


@pytest.fixture(scope="session", autouse=True)
def components():
    """Look for components of other packages once: every AppTest reads the metadata of all that is installed."""
    found = manifest_scanner.scan_component_manifests()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_scanner, "scan_component_manifests", lambda: found)
        yield


@pytest.fixture
def app(monkeypatch):
    """Open a page as a browser would that is given its address: ``app("search", run=…)``."""
    monkeypatch.setattr("streamlit.runtime.pages_manager.Path", NoPagesFolder)

    def opened(page: str = "overview", **query: str) -> AppTest:
        test = AppTest.from_file(str(ROOT / "app.py"), default_timeout=300)
        for name, value in query.items():
            test.query_params[name] = value
        return test.switch_page(f"pages/{page}.py").run()

    return opened

"""What pages send of the largest runs: no element above a megabyte, no curve of more points than a screen shows."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from routes import NAMES
from streamlit.testing.v1 import AppTest
from synthetic_large import large_model, long_search
from walking import charts, elements, views

from lowrank_core.search.records import read_trials

MEGABYTE = 1_000_000
CURVE_POINTS = 200 + 32
HEAVIEST = {"model": ("spectra_map", 560), "search": ("history", 1000)}
"""Run -> a chart that shows how large it is, and the least number of things in it."""


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Both runs, written once for all pages: kind -> home, run."""
    found = {}
    for kind in HEAVIEST:
        home = tmp_path_factory.mktemp(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOWRANK_HOME", str(home))
            found[kind] = home, (large_model(patch) if kind == "model" else long_search())
    return found


@pytest.fixture
def opened(app, homes, monkeypatch):
    def opened(page: str, kind: str) -> AppTest:
        home, run = homes[kind]
        monkeypatch.setenv("LOWRANK_HOME", str(home))
        return app(page, run=run.id)

    return opened


def points(values: object) -> int:
    """Return how many numbers Plotly was given: a list, or an array in base64."""
    if isinstance(values, dict):
        return len(base64.b64decode(values["bdata"])) // np.dtype(values["dtype"]).itemsize
    return len(values) if isinstance(values, list) else 0


def curves(test: AppTest) -> dict[str, int]:
    """Return the points of every line: chart and trace -> count."""
    found = {}
    for element in test.get("plotly_chart"):
        for number, trace in enumerate(json.loads(element.proto.spec)["data"]):
            if trace["type"] in ("scatter", "scattergl") and "lines" in trace.get("mode", "lines") and not trace.get("fill"):
                found[f"{element.proto.id[-24:]} {number}"] = points(trace.get("y"))
    return found


@pytest.mark.parametrize("page", NAMES)
@pytest.mark.parametrize("kind", HEAVIEST)
def test_nothing_that_a_page_shows_is_above_a_megabyte(opened, page, kind):
    test = opened(page, kind)
    for pressed in views(test):
        assert not test.exception, pressed
        assert not test.error, pressed
        heavy = {element.proto.id[-24:]: size for element in charts(test) if (size := element.proto.ByteSize()) > MEGABYTE / 2}
        assert not heavy, pressed
        assert max(element.proto.ByteSize() for element in elements(test)) < MEGABYTE, pressed
        assert not {name: count for name, count in curves(test).items() if count > CURVE_POINTS}, pressed


@pytest.mark.parametrize(("kind", "page"), [("model", "spectra"), ("search", "search")])
def test_the_runs_are_as_large_as_they_should_be(opened, kind, page):
    name, least = HEAVIEST[kind]
    (chart,) = (element for element in charts(opened(page, kind)) if element.proto.id.endswith(f"-{name}"))
    if kind == "model":
        _, targets = json.loads(chart.proto.spec)["data"]
        assert points(targets["x"]) >= least
    else:
        assert chart.proto.ByteSize() > 40 * least  # some numbers for each trial


def test_a_tick_parses_the_ranks_of_no_trial_again(homes):
    _, run = homes["search"]
    first, again = read_trials(run), read_trials(run)
    assert len(first) == 1000
    assert all(one.ranks is other.ranks for one, other in zip(first, again, strict=True))


def test_lists_and_arrays_are_counted_alike():
    values = base64.b64encode(np.arange(5, dtype="f8").tobytes()).decode()
    assert points({"dtype": "f8", "bdata": values}) == points([0, 1, 2, 3, 4]) == 5

"""What pages send of the largest run: no element above a megabyte, no curve of more points than a screen shows."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from routes import NAMES
from streamlit.testing.v1 import AppTest
from streamlit.testing.v1.element_tree import Element
from synthetic_large import large_run
from walking import charts, elements, views

from lowrank_core.studies.records import read_trials

pytestmark = pytest.mark.slow

MEGABYTE = 1_000_000
CURVE_POINTS = 200 + 32


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The home and the run, written once for all pages."""
    home = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(home))
        return home, large_run(patch)


@pytest.fixture
def opened(app, large, monkeypatch):
    def opened(page: str) -> AppTest:
        home, run = large
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
    result = {}
    for element in test.get("plotly_chart"):
        for number, trace in enumerate(json.loads(element.proto.spec)["data"]):
            if trace["type"] in ("scatter", "scattergl") and "lines" in trace.get("mode", "lines") and not trace.get("fill"):
                result[f"{element.proto.id[-24:]} {number}"] = points(trace.get("y"))
    return result


def chart_named(test: AppTest, key: str) -> Element:
    (chart,) = (element for element in charts(test) if element.proto.id.endswith(f"-{key}"))
    return chart


@pytest.mark.parametrize("page", NAMES)
def test_nothing_that_a_page_shows_is_above_a_megabyte(opened, page):
    test = opened(page)
    for pressed in views(test):
        assert not test.exception, pressed
        assert [error.value for error in test.error] == [], pressed
        largest = max(elements(test), key=lambda element: element.proto.ByteSize())
        assert largest.proto.ByteSize() < MEGABYTE, f"{pressed}: {largest.proto.id}"
        assert not {name: count for name, count in curves(test).items() if count > CURVE_POINTS}, pressed


def test_the_run_is_as_large_as_it_should_be(opened, large):
    _, targets = json.loads(chart_named(opened("spectra"), "spectra_map").proto.spec)["data"]
    assert points(targets["x"]) == 80 * 7
    assert chart_named(opened("search"), "history").proto.ByteSize() > 40 * 1000  # some numbers for each trial


def test_a_tick_parses_the_ranks_of_no_trial_again(large):
    _, run = large
    first, again = read_trials(run), read_trials(run)
    assert len(first) == 1000
    assert all(one.ranks is other.ranks for one, other in zip(first, again, strict=True))


def test_lists_and_arrays_are_counted_alike():
    values = base64.b64encode(np.arange(5, dtype="f8").tobytes()).decode()
    assert points({"dtype": "f8", "bdata": values}) == points([0, 1, 2, 3, 4]) == 5

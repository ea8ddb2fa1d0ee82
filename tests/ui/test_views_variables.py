"""What trials tell of variables, of time, and of workers, as numbers."""

from __future__ import annotations

import base64
import io
import os
import socket
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from synthetic import RATIO, VARIABLES, make_run, model_json, write_front, write_long_study, write_rich_study

from lowrank_core.config import RunConfig, SearchConfig
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import write_json
from lowrank_core.studies.records import TrialRecord, read_frozen, read_trials
from lowrank_core.studies.variables import Importances, VariableRange, importances, read_importances, read_ranges
from lowrank_core.studio.search import search_plan
from lowrank_core.studio.search.history import history
from lowrank_core.studio.search.history_chart import history_chart
from lowrank_core.studio.search.parallel_coordinates_chart import (
    fingerprint,
    fingerprint_chart,
    importance_chart,
    importance_table,
    missing_words,
)
from lowrank_core.studio.search.timeline_chart import timeline, timeline_chart
from lowrank_core.studio.shared.layer_map import layer_map
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.shared.thumbnail_chart import BLANK, thumbnail

SEARCH = SearchConfig(RATIO, trials=20)


@pytest.fixture
def long():
    return make_run(config=SEARCH, study=write_long_study)


# importance


def test_the_only_variable_that_matters_is_found(long):
    result = read_importances(long)
    assert result.found[0].name == "down"
    assert result.found[0].share > 0.9
    assert result.found[0].high > 0.99  # it is the value itself
    assert sum(entry.share for entry in result.found) == pytest.approx(1.0)
    assert all(0 <= entry.low <= entry.high <= 1 for entry in result.found)
    assert result == read_importances(long)  # the draws are seeded
    table = importance_table(result, read_trials(long), SEARCH)
    assert next(iter(table["variable"])) == "Kept of down"
    assert len(importance_chart(table).data) == len(VARIABLES)


def test_too_few_trials_tell_nothing_and_how_many_are_missing(long):
    few = importances(read_frozen(long)[:10])
    assert few == Importances((), 10, 6)
    assert (
        missing_words(few)
        == "The importance of variables can't be estimated from 10 trials that set them all: 6 more sampled trials are needed."
    )
    assert missing_words(replace(few, missing=0)) == ""
    assert importances([]).missing == 16


def test_trials_that_were_given_their_ranks_and_failed_ones_do_not_count():
    run = make_run(config=SEARCH, study=write_rich_study)
    assert read_importances(run).trials == 1


def test_over_a_range_of_ratios_the_loss_is_what_matters():
    result = importances(read_frozen(make_run(config=SearchConfig(0.2, max_ratio=0.6, trials=9), study=write_front)) * 4)
    assert result.found[0].name == "compression_ratio"


# the fingerprint


def test_ranges_place_a_value():
    assert VariableRange(0.5, 2.0, True).position(1.0) == pytest.approx(0.5)
    assert VariableRange(0.2, 1.0, False).position(0.4) == pytest.approx(0.25)
    assert VariableRange(0.2, 1.0, False).position(7.0) == 1.0
    assert VariableRange(1.0, 1.0, True).position(1.0) == 0.5


def test_the_best_trial_stands_first_and_every_variable_is_there(long):
    trials = read_trials(long)
    result = fingerprint(trials, SEARCH, read_ranges(long))
    assert (result.trials, result.variables, result.of_trials, result.of_variables) == (20, 5, 20, 5)
    first = result.frame[result.frame["place"] == 1]
    assert set(first["number"]) == {min(trials, key=lambda trial: trial.value).number}
    down = result.frame[result.frame["variable"] == "Kept of down"].sort_values("place")
    assert down["position"].is_monotonic_increasing  # the value is that variable
    drawn = fingerprint_chart(result, trials[0].number)
    assert drawn.data["chosen"].sum() == 5
    assert len(drawn.spec["layer"]) == 2


def test_of_many_variables_those_that_tell_most_are_shown(long):
    trials = read_trials(long)
    many = [
        replace(
            trial, params={f"v{index:02}": (trial.value if index == 37 else (trial.number * (index + 3) % 7) / 7) for index in range(40)}
        )
        for trial in trials
    ]
    result = fingerprint(many, SEARCH, {f"v{index:02}": VariableRange(0.0, 1.0, False) for index in range(40)})
    assert (result.variables, result.of_variables) == (24, 40)
    assert "Kept of v37" in set(result.frame["variable"])
    assert fingerprint(trials[:1], SEARCH, read_ranges(long)) is None


# the timeline


def record(number: int, **changes: object) -> TrialRecord:
    base = TrialRecord(number, "complete", "sampled", 0.1, {}, {}, 0.3, 0.1, 9.0, 100, 2.0, started=10.0, ended=12.0, worker="here:1")
    return replace(base, **changes)  # type: ignore[arg-type]


def test_trials_stand_where_they_were_measured():
    running = {"state": "running", "value": None, "ended": None}
    trials = [
        record(0),
        record(1, started=12.0, ended=15.0, worker="there:2"),
        record(2, **running, started=20.0),
        record(3, **running, started=20.0, worker="gone:3"),
        record(4, state="waiting", value=None, started=None, ended=None, worker=""),
    ]
    result = timeline(trials, {"here:1"}, 26.0)
    assert list(result["seconds"]) == [2.0, 3.0, 6.0, 0.0]
    assert list(result["worker"]) == ["here:1", "there:2", "here:1", "gone:3"]
    assert result["start"][0] == pd.Timestamp(10, unit="s", tz="UTC")
    assert result["note"][2] == "Trial 2, running, for 6.0 s"
    assert "its worker is gone" in result["note"][3]
    drawn = timeline_chart(result, 1)
    assert drawn.spec["height"] > timeline_chart(result[:1]).spec["height"]
    assert list(drawn.data["chosen"]) == [False, True, False, False]


def test_a_clock_that_was_set_back_makes_no_time_negative():
    result = timeline([record(0, started=3700.0, ended=102.0, seconds=2.0)], set(), 110.0)
    assert list(result["seconds"]) == [2.0]
    assert result["note"][0].endswith("took 2.0 s")


def test_the_times_of_a_study_are_read():
    run = make_run(state="running", config=SEARCH, study=write_rich_study)
    result = timeline(read_trials(run), {f"{socket.gethostname()}:{os.getpid()}"}, 4e9)
    assert len(result) == 9  # all but the one that waits
    assert result["seconds"].iloc[-1] > 1e9


# how long it will take


def test_the_nearest_run_tells_the_time(monkeypatch):
    measured = make_run(config=SEARCH, study=write_rich_study)
    for name, seconds in (("Calibrating", 3.0), ("Factorising", 4.0), ("Measuring uniform on test text", 99.0), ("Calibrating", 0.01)):
        measured.add_event("stage", name=name, seconds=seconds)
    config = replace(measured.config, search=SearchConfig(0.4, trials=10))
    tokens = config.text.validation_windows * (config.text.context - 1)
    result = search_plan.time_estimate(config)
    assert result.trials == pytest.approx(2.0 / 124 * tokens * 10)
    assert result.before == 4.0  # its calibration is kept
    again = replace(config, calibration=replace(config.calibration, group_size=16))
    assert search_plan.time_estimate(again).before == 7.0  # not the time of a second worker, which found it there
    assert result.basis == "trials of the same model, text and windows"
    longer = replace(config, text=replace(config.text, validation_windows=48))
    assert search_plan.time_estimate(longer).trials == pytest.approx(2 * result.trials)
    assert search_plan.time_estimate(longer).basis == "trials of the same model, scaled by tokens"
    other = replace(config, model=replace(config.model, reference="other/model"))
    assert search_plan.time_estimate(other) is None
    write_json(measured.path / "model.json", model_json())
    twice = replace(model_facts(measured), parameters=2 * model_facts(measured).parameters)
    scaled = search_plan.time_estimate(other, twice)
    assert scaled.trials == pytest.approx(2 * result.trials)
    assert scaled.before is None
    assert scaled.basis == "trials of another model, scaled by tokens and parameters"
    assert search_plan.time_estimate(RunConfig()) is None


def test_a_run_that_was_shipped_is_gone_by_last_and_it_is_said(tmp_path, monkeypatch):
    shipped = make_run(path=tmp_path / "recorded-run", config=SEARCH, study=write_rich_study)
    shipped.add_event("stage", name="Calibrating", seconds=3.0)
    write_json(shipped.path / "run.json", {**shipped.record, "recorded": True})
    monkeypatch.setattr("lowrank_core.studio.shared.run_list.recorded_run", lambda: shipped)
    assert search_plan.time_estimate(shipped.config).basis == "trials of the same model, text and windows, on another machine"
    assert search_plan.time_estimate(shipped.config).before == 3.0  # what another machine keeps is not here
    make_run(config=SEARCH, study=write_rich_study)
    assert "another machine" not in search_plan.time_estimate(shipped.config).basis


# the picture of an allocation


def pixels(address: str) -> np.ndarray:
    """The colours (height, width, 4) of a PNG in an address."""
    assert address.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGBA"))


def test_a_picture_has_a_cell_for_each_module_in_the_colours_of_the_map():
    shapes = [MatrixShape(f"l.{depth}.{kind}", kind, depth, 4, 4) for depth in range(3) for kind in ("q", "k")]
    shapes.pop()  # block 2 has no k
    result = pixels(thumbnail(layer_map(shapes, [0.0, 1.0, 0.5, 0.5, 0.5], [""] * 5, "kept", percent=True, full_scale=True)))
    height, width = result.shape[0] // 2, result.shape[1] // 3

    def middle(row: int, column: int) -> tuple[int, ...]:
        return tuple(result[height * row + height // 2, width * column + width // 2])

    assert middle(0, 0) == (0, 34, 78, 255)  # cividis begins there
    assert middle(1, 0) == (254, 232, 56, 255)
    assert middle(1, 2)[3] == 0  # nothing there


def test_the_picture_of_an_80_layer_model_is_small():
    shapes = [MatrixShape(f"l.{depth}.{kind}", kind, depth, 4, 4) for depth in range(80) for kind in "qkvogud"]
    kept = np.random.default_rng(0).uniform(size=len(shapes))
    assert len(thumbnail(layer_map(shapes, list(kept), [""] * len(shapes), "kept", percent=True, full_scale=True))) < 4000


def test_the_history_carries_a_picture_for_each_trial_that_has_one(long):
    view = history(read_trials(long), "kl")
    drawn = history_chart(view, None, {3: "data:image/png;base64,AAAA"})
    points = next(layer for layer in drawn.spec["layer"] if "params" in layer)
    assert points["encoding"]["description"] == {"field": "note"}  # what is read aloud holds no picture
    assert list(drawn.data["picture"][:5]) == [BLANK, BLANK, BLANK, "data:image/png;base64,AAAA", BLANK]

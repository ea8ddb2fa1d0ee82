"""Remaining times, by a clock that the test moves: what earlier sessions did makes no stage look nearly done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, RunConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import Cancelled
from lowrank_core.healing.trainer import heal
from lowrank_core.models import ModelHandle
from lowrank_core.runs import Run, create_run
from lowrank_core.runs.stage_times import estimated
from lowrank_core.statistics.calibration import cached_statistics, collect_statistics, statistics_key
from lowrank_core.statistics.gradients import cached_gradients
from lowrank_core.statistics.store import exclusive, statistics_folder
from lowrank_core.studio.shared.run_list import status_words
from lowrank_core.text import WindowSet
from lowrank_core.worker.main import _remaining
from lowrank_core.worker.pace import Pace
from lowrank_core.worker.reporter import Reporter

CONFIG = CalibrationConfig(group_size=4, batch_size=2)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr("lowrank_core.worker.pace.perf_counter", lambda: result.now)
    return result


@pytest.fixture
def few(windows: WindowSet) -> WindowSet:
    return replace(windows, ids=windows.ids[:16])


@pytest.fixture
def run() -> Run:
    return create_run(RunConfig())


@pytest.fixture
def reporter(run: Run) -> Iterator[Reporter]:
    result = Reporter(run, verbose=False)
    yield result
    result.close("stopped")


def test_steps_of_earlier_sessions_are_not_counted(clock: Clock):
    pace = Pace()
    clock.pass_(30.0)  # loading what was there
    assert pace.remaining(90, 100) is None
    clock.pass_(60.0)
    assert pace.remaining(91, 100) == pytest.approx(9 * 60.0)
    clock.pass_(30.0)
    assert pace.remaining(92, 100) == pytest.approx(8 * 45.0)
    clock.pass_(0.0)
    assert pace.remaining(100, 100) == 0.0


def test_a_wait_is_not_a_step(clock: Clock):
    pace = Pace()
    for _ in range(5):
        clock.pass_(100.0)
        assert pace.remaining(0, 10) is None
    clock.pass_(2.0)
    assert pace.remaining(1, 10) == pytest.approx(18.0)


@pytest.mark.parametrize("again", [(1, 4), (0, 10)])
def test_another_count_in_the_same_stage_is_timed_anew(clock: Clock, again: tuple[int, int]):
    pace = Pace()
    for done in range(11):
        pace.remaining(done, 10)
        clock.pass_(1000.0)
    first, total = again
    assert pace.remaining(first, total) is None
    clock.pass_(3.0)
    assert pace.remaining(first + 1, total) == pytest.approx(3.0 * (total - first - 1))


def test_a_resumed_stage_says_what_is_left(clock: Clock, run: Run, reporter: Reporter):
    with reporter.stage("Calibrating", 256) as progress:
        clock.pass_(40.0)
        progress(200, 256)
        clock.pass_(10.0)
        progress(201, 256)
        reporter.say()
        words = status_words(run.status())  # 55 steps of 10 s; elapsed / done gave 13 s
        assert words == "201 of 256 · about 9 min 10 s left · stage 4 of 5"


def test_a_request_has_no_place_among_the_stages_of_the_run(run: Run, reporter: Reporter):
    reporter.plan((), 8, kept=())
    reporter.respect(run.path / "run.json")
    with reporter.stage("Reading the text"):
        assert run.status().stage_number == 0
    reporter.respect(None)
    assert estimated(run.config.model, {"Reading the text": 1.0}, ["Reading the text"]).total is None
    with reporter.stage("Reading the text"):
        assert (run.status().stage_number, run.status().stages) == (2, 5)
    assert estimated(run.config.model, {"Reading the text": 1.0}, ["Reading the text"]).total is not None


class Watched:
    """A progress callback that moves the clock by a fixed time for each step, and keeps what a stage would say."""

    def __init__(self, clock: Clock, seconds: float, stop: Callable[[int], bool] = lambda calls: False) -> None:
        self._clock, self._seconds, self._stop, self._pace = clock, seconds, stop, Pace()
        self.said: list[tuple[int, int, float | None]] = []

    def __call__(self, done: int, total: int) -> None:
        self._clock.pass_(self._seconds)
        self.said.append((done, total, self._pace.remaining(done, total)))
        if self._stop(len(self.said)):
            raise Cancelled

    def check(self) -> None:
        """Every estimate is the time of a step times the steps that are left."""
        reported = [(done, total, left) for done, total, left in self.said if left is not None]
        assert reported
        for done, total, left in reported:
            assert left == pytest.approx(self._seconds * (total - done))


def test_a_resumed_calibration(clock: Clock, llama: ModelHandle, few: WindowSet, tmp_path: Path):
    with pytest.raises(Cancelled):
        cached_statistics(llama, few, CONFIG, tmp_path, progress=Watched(clock, 1.0, lambda calls: calls == 12))
    resumed = Watched(clock, 10.0)
    cached_statistics(llama, few, CONFIG, tmp_path, progress=resumed)
    assert resumed.said[0][0] == 9
    resumed.check()


def test_who_waits_for_another_calibration_is_told_how_far_that_is(clock: Clock, llama: ModelHandle, few: WindowSet, tmp_path: Path):
    with pytest.raises(Cancelled):
        cached_statistics(llama, few, CONFIG, tmp_path, progress=Watched(clock, 1.0, lambda calls: calls == 12))
    waiting = Watched(clock, 1.0, lambda calls: calls == 2)
    with exclusive(statistics_folder(tmp_path, statistics_key(llama, few, CONFIG), few.context), lambda: None), pytest.raises(Cancelled):
        cached_statistics(llama, few, CONFIG, tmp_path, progress=waiting)
    assert waiting.said == [(8, 16, None), (8, 16, None)]


def test_resumed_gradients(clock: Clock, llama: ModelHandle, few: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowrank_core.statistics.gradients.free_memory", lambda device: 0)
    with pytest.raises(Cancelled):
        cached_gradients(llama, few, CONFIG, tmp_path, progress=Watched(clock, 1.0, lambda calls: calls == 10))
    resumed = Watched(clock, 10.0)
    cached_gradients(llama, few, CONFIG, tmp_path, progress=resumed)
    resumed.check()


def test_a_resumed_healing(clock: Clock, llama: ModelHandle, windows: WindowSet, tmp_path: Path):
    texts = replace(windows, ids=windows.ids[:30]), replace(windows, split="validation", ids=windows.ids[30:])
    decomposed = decompose(llama, collect_statistics(llama, windows, CONFIG), CompressionConfig(basis="whitened", value_dense=False))
    small = decomposed.compress(decomposed.allocate("uniform", 0.5), windows).handle
    config = HealingConfig(method="distill", steps=12, batch_size=2, validate_every=4, learning_rate=1e-3)
    with pytest.raises(Cancelled):
        heal(small, llama, texts, config, folder=tmp_path, progress=Watched(clock, 1.0, lambda calls: calls == 6))
    resumed = Watched(clock, 10.0)
    heal(small, llama, texts, config, folder=tmp_path, progress=resumed)
    assert resumed.said[0][0] == 5
    resumed.check()


def test_a_search_goes_by_the_trials_of_this_session():
    assert _remaining([], 30, workers=1) is None
    assert _remaining([10.0, 20.0], 30, workers=1) == pytest.approx(450.0)
    assert _remaining([10.0, 20.0], 30, workers=3) == pytest.approx(150.0)
    assert _remaining([10.0], -2, workers=1) == 0.0

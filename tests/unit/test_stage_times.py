"""Estimates of stages: their arithmetic by a synthetic clock, the machine's record, and what is said while stages run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_core.cli import main
from lowrank_core.commands.shared import Stages, progress_line
from lowrank_core.compression import estimate as pieces_module
from lowrank_core.compression.estimate import TimedPieces
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.config.healing import HealingConfig
from lowrank_core.errors import RunError
from lowrank_core.healing import estimate as healing
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import home
from lowrank_core.runs.stage_times import (
    PieceTimer,
    StageTime,
    TimeEstimate,
    estimated,
    line_through,
    remember,
    stage_of,
    stages_of,
    stages_of_compression,
    work_of,
)
from lowrank_core.statistics.calibration import LayerStatistics
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.shared.stage_estimate import stage_estimate, stage_estimate_words
from lowrank_core.text import WindowSet

SHAPES = (MatrixShape("a.q", "q", 0, 32, 32, input_group="a.q"), MatrixShape("a.k", "k", 0, 16, 32, input_group="a.q"))
DEMO, OTHER = ModelSource("demo"), ModelSource("other")
SEQUENTIAL = CompressionConfig(basis="drift_aware:two_sided")
SECONDS = st.floats(0, 1e4)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: Callable[..., float], result: object = None) -> Callable[..., object]:
        """Return a function that takes ``seconds`` of its arguments."""

        def run(*arguments: object, **options: object) -> object:
            self.now += seconds(*arguments)
            return result

        return run


@given(st.lists(SECONDS, min_size=1, max_size=9))
def test_stages_add_up(seconds: list[float]):
    names = [f"stage {number}" for number in range(len(seconds))]
    plan = TimeEstimate(tuple(map(StageTime, names, seconds)))
    assert plan.total == pytest.approx(sum(seconds))
    for place, name in enumerate(names):
        assert plan.number(name) == place + 1
        assert plan.after(name) == pytest.approx(sum(seconds[place + 1 :]))
    unknown = TimeEstimate((*plan.stages, StageTime("last", None)))
    assert unknown.total is None
    assert unknown.after(names[0]) is None
    assert unknown.after("last") == 0


@given(SECONDS, SECONDS, st.integers(1, 8), st.integers(9, 99), st.integers(1, 999))
def test_two_pieces_tell_the_line(fixed: float, each: float, few: int, more: int, windows: int):
    a, c = line_through((few, fixed + each * few), (more, fixed + each * more))
    assert a + c * windows == pytest.approx(fixed + each * windows, abs=1e-6 * (fixed + each * max(windows, more)) + 1e-9)


@given(SECONDS, SECONDS)
def test_noise_makes_no_negative_seconds(first: float, second: float):
    a, c = line_through((2, first), (6, second))
    assert a >= 0
    assert c >= 0


@given(st.integers(1, 500), st.integers(1, 500))
def test_more_windows_are_never_less_work(one: int, other: int):
    few, more = sorted((one, other))
    works = [work_of(RunConfig(text=TextConfig(calibration_windows=n)), SHAPES, 64, compression=SEQUENTIAL) for n in (few, more)]
    assert all(works[0][stage] <= works[1][stage] for stage in works[0])
    assert few == more or works[0]["Calibrating"] < works[1]["Calibrating"]


def test_a_slow_first_call_is_no_part_of_the_line():
    clock, calls = Clock(), 0

    def piece(steps: int) -> None:
        nonlocal calls
        calls += 1
        clock.now += 1 + 2 * steps + (50 if calls == 1 else 0)

    assert PieceTimer(clock).line(piece, (1, 3), 100) == pytest.approx((1, 2))


@pytest.mark.parametrize("every", [1, 2, 3, 50])
def test_pieces_grow_until_they_tell_something_or_all_was_timed(every: int):
    clock = Clock()
    fixed, each = PieceTimer(clock).line(clock.takes(lambda steps: 0.01 * steps), (2, 6), every)
    assert fixed + each * every == pytest.approx(0.01 * every)


def test_the_stages_of_a_run():
    assert stages_of(RunConfig()) == (
        *("Loading the model", "Reading the text", "Computing weight spectra", "Calibrating", "Computing spectra"),
    )
    by_gradients = replace(SearchConfig(), compression=CompressionConfig(basis="two_sided"), error_weights=True)
    assert {"Measuring gradients", "Measuring error weights"} <= set(stages_of(RunConfig(search=by_gradients)))
    plain = replace(SearchConfig(), compression=CompressionConfig(basis="whitened"))
    assert not {"Measuring gradients", "Measuring error weights", "Selecting"} & set(stages_of(RunConfig(search=plain)))
    assert stages_of_compression(CompressionConfig(basis="whitened"), tune=True)[2] == "Tuning"
    assert stage_of("Factorising by Studio (default)") == "Factorising"
    assert stage_of("Another stage") == "Another stage"


def test_the_record_scales_a_stage_by_its_work():
    assert estimated(DEMO, {"Calibrating": 7.0}, ["Calibrating"]).total is None
    remember(DEMO, {"Calibrating": 100.0}, "Calibrating", 8.0)
    assert estimated(DEMO, {"Calibrating": 50.0}, ["Calibrating"]).total == pytest.approx(4.0)
    assert estimated(OTHER, {"Calibrating": 200.0}, ["Calibrating"]).stages[0].words == "an earlier run of demo"
    remember(OTHER, {"Calibrating": 100.0}, "Calibrating", 1.0)
    assert estimated(DEMO, {"Calibrating": 100.0}, ["Calibrating"]).total == pytest.approx(8.0)  # its own comes first
    kept = estimated(DEMO, {"Calibrating": 100.0}, ["Calibrating"], kept=["Calibrating"])
    assert kept.stages == (StageTime("Calibrating", 0.0, "on disk already"),)
    assert estimated(replace(DEMO, device="cuda"), {"Calibrating": 100.0}, ["Calibrating"]).total is None


def test_a_home_that_nothing_can_be_written_in_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(RunError, match="set LOWRANK_HOME to another folder"):
        remember(DEMO, {"Calibrating": 1.0}, "Calibrating", 2.0)


def test_a_stage_that_is_done_does_not_fail_for_want_of_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "file" / "home"))
    stages = Stages()
    stages._work = {"Calibrating": 1.0}
    with stages.stage("Calibrating"):
        pass
    assert list(stages.seconds) == ["Calibrating"]
    assert "warning: the time of this stage is not kept: can't write in" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"stages": 3}', '{"stages": [{"stage": "Calibrating"}]}'])
def test_a_damaged_record_is_written_again(content: str):
    (home() / "stage_times.json").write_text(content)
    assert estimated(DEMO, {"Calibrating": 1.0}, ["Calibrating"]).total is None
    remember(DEMO, {"Calibrating": 1.0}, "Calibrating", 2.0)
    assert estimated(DEMO, {"Calibrating": 1.0}, ["Calibrating"]).total == 2.0


@pytest.fixture
def pipeline(llama_checkpoint: Path, text_file: Path) -> Pipeline:
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=40)
    calibration = CalibrationConfig(gradient_windows=30)
    return Pipeline(str(llama_checkpoint), text, calibration=calibration, compression=CompressionConfig(basis="drift_aware:two_sided"))


def test_estimates_are_exact_where_stages_follow_their_law(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    two = 2  # blocks of the model, equally large; the pieces see the layers of one

    def blocks(handle: ModelHandle) -> int:
        return len({layer.shape.depth for layer in handle.layers})

    real = pieces_module.BlockRunner(pipeline.handle)
    monkeypatch.setattr(pieces_module, "BlockRunner", clock.takes(lambda handle: 0.25, real))
    monkeypatch.setattr(
        pieces_module, "collect_statistics", clock.takes(lambda part, windows, _: 0.25 + blocks(part) * (3 + 0.5 * windows.windows))
    )
    monkeypatch.setattr(pieces_module, "collect_gradients", clock.takes(lambda handle, windows, _: 5 + 2 * windows.windows))
    monkeypatch.setattr(pieces_module, "write_block", clock.takes(lambda path, statistics, _: 0.75))
    monkeypatch.setattr(TimedPieces, "_moments", LayerStatistics({}, CalibrationConfig(), 0.0))
    monkeypatch.setattr(TimedPieces, "_outputs", {})
    monkeypatch.setattr(pieces_module, "evaluate", clock.takes(lambda handle, windows: 1 + 0.125 * windows.windows))
    fit = clock.takes(lambda allocation, windows: 0.25 + 4 + 0.5 * windows.windows)  # no second copy of the model
    decomposed = SimpleNamespace(allocate=lambda name, ratio: None, compress=fit, basis=metric_named("drift_aware:two_sided"))
    monkeypatch.setattr(TimedPieces, "_decompose", property(lambda _: lambda: decomposed))
    pieces = TimedPieces(pipeline, compression_ratio=0.2, clock=clock)
    fitted = min(40, pipeline.compression.fit_windows)
    assert pieces.stage("Compressing").seconds == pytest.approx(0.25 + two * (4 + 0.5 * fitted))
    assert pieces.stage("Calibrating").seconds == pytest.approx(0.25 + two * (3 + 0.5 * 40 + 0.75))
    assert pieces.stage("Measuring gradients").seconds == pytest.approx(5 + 2 * 30 + two * 0.75)
    assert pieces.evaluating("Searching", 1000).seconds == pytest.approx(1 + 0.125 * 1000)
    assert pieces.stage("Tuning").seconds is None


def test_pieces_of_the_real_stages_are_timed(pipeline: Pipeline):
    pieces = TimedPieces(pipeline, compression_ratio=0.2, allocator="uniform")
    stages = [pieces.stage(name) for name in stages_of_compression(pipeline.compression)]
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in stages), stages
    _ = pipeline.moments
    assert pieces.stage("Calibrating") == StageTime("Calibrating", 0.0, "on disk already")


def _compress(checkpoint: Path, text: Path, *more: str) -> list[str]:
    sizes = ["--windows", "12", "--context", "32", "--test-windows", "4", "--group-size", "4"]
    return ["compress", "--model", str(checkpoint), "--text", f"file:{text}", *sizes, "--compression-ratio", "0.3", "--json", *more]


def test_compress_says_what_it_will_take_and_what_it_took(
    llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(_compress(llama_checkpoint, text_file, "--estimate")) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["seconds"] == pytest.approx(sum(stage["seconds"] for stage in before["stages"]))
    assert not list(tmp_path.iterdir())
    assert main(_compress(llama_checkpoint, text_file, "--out", str(tmp_path / "small"))) == 0
    after = json.loads(capsys.readouterr().out)
    assert [stage_of(name) for name in after["stages"]] == [stage["name"] for stage in before["stages"]]
    assert all(took["seconds"] > 0 and took["cpu_seconds"] >= 0 for took in after["stages"].values())
    assert sum(took["seconds"] for took in after["stages"].values()) <= after["seconds"]
    facts = read_model(llama_checkpoint).facts
    known = stage_estimate(RunConfig(ModelSource(str(llama_checkpoint))), facts)
    assert known.seconds("Calibrating") is not None
    assert known.total is None
    assert "reading the text, computing weight spectra, computing spectra" in stage_estimate_words(known)


def test_search_says_what_it_will_take(llama_checkpoint: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    command = ["search", *_compress(llama_checkpoint, text_file)[1:], "--validation-windows", "4", "--trials", "7", "--estimate"]
    assert main(command) == 0
    stages = {stage["name"]: stage["seconds"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert min(stages["Searching"], stages["Measuring the dense model"]) > 0  # which takes longer is a matter of milliseconds here
    facts = read_model(llama_checkpoint).facts
    source = ModelSource(str(llama_checkpoint))
    estimate = stage_estimate(RunConfig(source, TextConfig(calibration_windows=9)), facts)
    assert estimate.total is not None
    assert "going by an earlier run." in stage_estimate_words(estimate)


def test_heal_says_what_it_will_take(llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = tmp_path / "small"
    assert main(_compress(llama_checkpoint, text_file, "--out", str(small))) == 0
    capsys.readouterr()
    sizes = ["--context", "32", "--validation-windows", "4", "--test-windows", "4", "--train-windows", "16"]
    seconds = {}
    for steps in ("20", "40"):
        words = ["heal", "--model", str(small), "--text", f"file:{text_file}", *sizes, "--steps", steps, "--estimate", "--json"]
        assert main(words) == 0
        seconds[steps] = {stage["name"]: stage["seconds"] for stage in json.loads(capsys.readouterr().out)["stages"]}
        assert all(value > 0 for value in seconds[steps].values())
    assert list(tmp_path.iterdir()) == [small]


def test_a_healing_takes_its_steps_and_its_validations(llama: ModelHandle, windows: WindowSet, monkeypatch: pytest.MonkeyPatch):
    clock, validation = Clock(), replace(windows, ids=windows.ids[:5])
    monkeypatch.setattr(healing, "heal", clock.takes(lambda compressed, dense, texts, config: 7 + 2.5 * config.steps))
    monkeypatch.setattr(healing, "score_windows", clock.takes(lambda handle, windows: 0.25 * windows.windows))
    given = HealingConfig(steps=100, validate_every=30, learning_rate=1e-3)
    steps, validations = healing.healing_times((llama, llama), (windows, validation), given, clock=clock)
    assert steps.seconds == pytest.approx(250)
    assert validations.seconds == pytest.approx((3 + 4) * 1.25)
    measured = healing.healing_times((llama, llama), (windows, validation), replace(given, learning_rate=None), clock=clock)
    assert measured[1].seconds == pytest.approx((3 + 4 + 9) * 1.25)


@pytest.mark.parametrize("command", ["compress", "search", "heal"])
def test_a_place_is_needed_unless_time_is_asked_for(command: str, capsys: pytest.CaptureFixture[str]):
    ratio = [] if command == "heal" else ["--compression-ratio", "0.2"]
    arguments = [command, "--model", "demo", "--text", "python-stdlib", *ratio]
    assert main(arguments) == 2
    assert "--estimate" in capsys.readouterr().err


def test_a_log_has_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"lowrank_core.worker.pace.{name}", clock)
    progress = progress_line("Healing")
    for step in range(1, 62):
        progress(step, 100)
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("Healing 31/100, about 1 min 09 s left")


def test_a_stage_says_its_place_and_what_is_left_in_all(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock, handle, source = Clock(), pipeline.handle, pipeline.source
    config = RunConfig(source, pipeline.text, pipeline.calibration)
    work = work_of(config, handle.shapes, handle.width * handle.vocabulary, compression=pipeline.compression)
    remember(source, work, "Calibrating", 100.0)
    remember(source, work, "Factorising", 60.0)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"lowrank_core.worker.pace.{name}", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    stages = Stages()
    stages.plan(pipeline, ("Calibrating", "Factorising"))
    with stages.stage("Calibrating", 10) as progress:
        for step in range(1, 6):
            progress(step, 10)
            clock.now += 10
    assert "stage 1 of 2, about 1 min 00 s left, about 2 min 00 s left in all" in capsys.readouterr().err
    assert estimated(source, work, ("Calibrating",)).total == 100.0  # half of a stage is not recorded

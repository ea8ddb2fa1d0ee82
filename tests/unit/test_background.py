"""What is measured in the background waits for trials and requests, yields for them, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_core.compression.sensitivity import measured_cell
from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.runs import Run, client, create_run, read_json
from lowrank_core.sensitivity.records import read_records
from lowrank_core.studies.records import read_trials
from lowrank_core.worker import sensitivity as bench
from lowrank_core.worker.main import run_worker

ASKED = {"kept": [0.5], "kinds": ["q_proj"]}
"""Three cells: the type, and the module of each block."""


@pytest.fixture
def make(llama_checkpoint: Path, text_file: Path) -> Callable[..., Run]:
    def made(search: SearchConfig | None = None) -> Run:
        text = TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6)
        calibration = CalibrationConfig(group_size=8)
        return create_run(RunConfig(model=ModelSource(str(llama_checkpoint)), text=text, calibration=calibration, search=search))

    return made


@pytest.fixture
def before_cells(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Call a function with the number of each cell, from 1, before it is measured."""

    def install(call: Callable[[int], None]) -> None:
        numbers: list[int] = []

        def watched(*arguments: object, **options: object) -> object:
            numbers.append(len(numbers) + 1)
            call(numbers[-1])
            return measured_cell(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(bench, "measured_cell", watched)

    return install


def cells(run: Run) -> int:
    return sum(len(record.cells) for record in read_records(run))


def test_trials_and_requests_come_first_wherever_they_stand(
    make: Callable[..., Run], before_cells: Callable[[Callable[[int], None]], None]
):
    run = make(SearchConfig(compression_ratio=0.3, trials=4, startup_trials=2, confirmed=0))
    request = client.submit(run, "sensitivity", launch=False, **ASKED)
    seen: dict[int, tuple[int, int]] = {}
    asked: list[str] = []

    def watch(number: int) -> None:
        seen[number] = len(read_trials(run)), sum(read_json(client.result_path(run, one)) is not None for one in asked)
        if number == 1:
            asked.append(client.submit(run, "compare", launch=False, trial="uniform"))
        if number == 2:
            run.change_search(trials=6)

    before_cells(watch)
    run_worker(run, verbose=False)
    assert seen == {1: (4, 0), 2: (4, 1), 3: (6, 1)}  # all trials, then the comparison, then the further trials
    answer = read_json(client.result_path(run, request))
    assert answer is not None
    assert answer["ok"]
    assert (answer["cells"], cells(run)) == (3, 3)
    assert len(list((run.path / "results").glob("[0-9]*.json"))) == 2


def test_a_request_that_is_withdrawn_ends_after_the_cell_in_hand(
    make: Callable[..., Run], before_cells: Callable[[Callable[[int], None]], None]
):
    run = make()
    request = client.submit(run, "sensitivity", launch=False, **ASKED)
    before_cells(lambda number: client.cancel(run, request))
    run_worker(run, verbose=False)
    assert read_json(client.result_path(run, request)) is None
    assert not client.pending_requests(run)
    assert cells(run) == 1
    assert run.status().state == "finished"


def test_stop_ends_it_and_the_next_request_measures_the_rest(
    make: Callable[..., Run], before_cells: Callable[[Callable[[int], None]], None]
):
    run = make()
    first = client.submit(run, "sensitivity", launch=False, **ASKED)
    before_cells(lambda number: client.request_stop(run) if number == 2 else None)
    run_worker(run, verbose=False)
    answer = read_json(client.result_path(run, first))
    assert answer is not None
    assert (answer["ok"], answer["error"]) == (False, "Stopped before it was done. Ask again.")
    assert cells(run) == 2
    run.pause_marker.unlink()
    second = client.submit(run, "sensitivity", launch=False, **ASKED)
    run_worker(run, verbose=False)
    answer = read_json(client.result_path(run, second))
    assert answer is not None
    assert (answer["measured"], answer["cells"]) == (1, 3)


def test_a_bad_request_is_answered_with_the_reason(make: Callable[..., Run]):
    run = make()
    request = client.submit(run, "sensitivity", launch=False, kept=[2.0])
    run_worker(run, verbose=False)
    answer = read_json(client.result_path(run, request))
    assert answer is not None
    assert "a kept ratio must lie between 0 and 1" in str(answer["error"])


def test_the_background_is_listed_last(make: Callable[..., Run]):
    run = make()
    for kind in ("sensitivity", "compare"):
        client.submit(run, kind, launch=False)
    assert [request["kind"] for request in client.pending_requests(run)] == ["compare", "sensitivity"]

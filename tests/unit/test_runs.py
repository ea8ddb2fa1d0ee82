"""Run directories: whole files or none, damage that is reported, and a status that knows whether its process lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_core.config import CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig, from_mapping, to_mapping
from lowrank_core.errors import Cancelled, ConfigError, RunError
from lowrank_core.runs import (
    Run,
    RunStatus,
    create_run,
    home,
    list_runs,
    open_run,
    process_started,
    read_json,
    write_json,
)
from lowrank_core.runs.client import pending_requests, request_stop, result_path, start_worker, submit
from lowrank_core.worker.reporter import Reporter

SEARCH = RunConfig(search=SearchConfig(compression_ratio=0.3, compression=CompressionConfig(basis="weight_svd")))


@pytest.fixture
def run() -> Run:
    return create_run(RunConfig())


# --- files -----------------------------------------------------------------------------------------------------------


def test_json_is_read_as_it_was_written(tmp_path: Path):
    body = {"a": 1, "b": [None, "ü"], "c": {"d": 0.1}}
    write_json(tmp_path / "deep" / "a.json", body)
    assert read_json(tmp_path / "deep" / "a.json") == body
    assert read_json(tmp_path / "none.json") is None


def test_readers_never_see_half_a_file(tmp_path: Path):
    path = tmp_path / "a.json"
    bodies = [{"fill": letter * 20_000} for letter in "ab"]
    write_json(path, bodies[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(200):
            write_json(path, bodies[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert read_json(path) in bodies
        reads += 1
    writer.join()
    assert reads > 10
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert read_json(path) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="set LOWRANK_HOME to a folder"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_damaged_json_is_told(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_home_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, lowrank_home: Path):
    assert home() == lowrank_home
    monkeypatch.delenv("LOWRANK_HOME")
    assert home() == Path.home() / ".cache" / "lowrank"


@pytest.mark.parametrize("config", [RunConfig(), SEARCH], ids=["analysis", "search"])
def test_a_run_gives_its_config_back(config: RunConfig):
    run = create_run(config, name="mine")
    assert open_run(run.path).config == config
    assert run.record["kind"] == ("search" if config.search else "analysis")
    assert run.record["name"] == "mine"
    assert {"python", "torch", "transformers", "optuna"} <= set(run.record["versions"])
    assert run.path.parent == home() / "runs"


def test_paths_of_a_run_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = create_run(RunConfig(ModelSource("model"), TextConfig("file:notes.txt"))).config
    assert config.model.reference == str(tmp_path / "model")
    assert config.text.reference == f"file:{tmp_path / 'notes.txt'}"
    assert create_run(RunConfig(ModelSource("demo"), TextConfig("wikitext-2"))).config == RunConfig(text=TextConfig("wikitext-2"))


def test_a_taken_folder_is_refused(tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        create_run(RunConfig(), path=tmp_path)
    with pytest.raises(RunError, match="is not empty"):
        create_run(RunConfig(), path=tmp_path / "note.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_runs_are_listed_the_newest_first():
    first = create_run(RunConfig())
    second = create_run(SEARCH)
    assert [run.id for run in list_runs()] == [second.id, first.id]


def _spoil_run(run: Run, **changes: object) -> None:
    (run.path / "run.json").write_text(json.dumps(run.record | changes))


def test_damaged_runs_are_left_out_of_the_list():
    whole, torn, foreign, undated, older = (create_run(RunConfig()) for _ in range(5))
    (torn.path / "run.json").write_text("{")
    _spoil_run(foreign, config={"model": 3})
    _spoil_run(undated, created="yesterday")
    _spoil_run(older, config={"colour": "blue"})
    (home() / "runs" / "empty").mkdir()
    (home() / "runs" / "file").write_text("not a folder")
    assert [run.id for run in list_runs()] == [whole.id]


def test_no_runs_before_the_first():
    assert list_runs() == []


@pytest.mark.parametrize("changes", [{"config": {"colour": "blue"}}, {"config": 3}, {"config": {"search": {"compression_ratio": 2}}}])
def test_a_damaged_config_is_told(run: Run, changes: dict[str, object]):
    _spoil_run(run, **changes)
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        open_run(run.path)


def test_a_run_without_its_record_is_told(tmp_path: Path, run: Run):
    with pytest.raises(RunError, match=r"is no run: it has no run\.json"):
        open_run(tmp_path)
    (run.path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="is damaged"):
        open_run(run.path)


def test_configs_tell_what_they_do_not_know():
    assert from_mapping(RunConfig, to_mapping(SEARCH)) == SEARCH
    with pytest.raises(ConfigError, match="unknown colour; it knows"):
        from_mapping(TextConfig, {"colour": "blue"})
    with pytest.raises(ConfigError, match="expected int, got '3'"):
        from_mapping(TextConfig, {"context": "3"})
    with pytest.raises(ConfigError, match="expected an object"):
        from_mapping(RunConfig, {"text": 3})


# --- status ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sleeper():
    """A live process of ours."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def _held_by(run: Run, pid: int, state: str = "running", shift: float = 0.0) -> None:
    started = process_started(pid)
    assert started is not None
    run.write_status(RunStatus(state=state, pid=pid, pid_started=started + shift))


def test_a_new_run_has_a_new_status(run: Run):
    assert run.status() == RunStatus()
    assert not run.status().active


def test_a_live_worker_is_believed(run: Run, sleeper: subprocess.Popen[bytes]):
    _held_by(run, sleeper.pid)
    assert run.worker_alive()
    assert run.status().state == "running"
    assert time.time() - run.status().heartbeat < 60


def test_a_dead_worker_is_told_from_its_last_word(run: Run, sleeper: subprocess.Popen[bytes]):
    _held_by(run, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert not run.worker_alive()
    assert run.status().state == "interrupted"
    assert "Resume" in run.status().message


def test_a_zombie_is_dead(sleeper: subprocess.Popen[bytes]):
    assert process_started(sleeper.pid) is not None
    sleeper.kill()
    deadline = time.monotonic() + 10
    while process_started(sleeper.pid) is not None:  # not waited for: it stays a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reused_pid_is_not_the_worker(run: Run, sleeper: subprocess.Popen[bytes]):
    _held_by(run, sleeper.pid, shift=-100.0)
    assert not run.worker_alive()
    assert run.status().state == "interrupted"


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_last_word_stays_when_the_process_is_gone(run: Run, state: str):
    run.write_status(RunStatus(state=state, pid=2**22 + 1, pid_started=1.0))
    assert run.status().state == state


def test_a_queued_worker_has_some_time_to_come_up(run: Run, monkeypatch: pytest.MonkeyPatch):
    run.write_status(RunStatus(state="queued"))
    assert run.worker_alive()
    later = time.time() + 120
    monkeypatch.setattr(time, "time", lambda: later)
    assert not run.worker_alive()
    assert run.status().state == "interrupted"


def test_a_stop_request_shows_until_it_is_met(run: Run):
    _held_by(run, os.getpid())
    request_stop(run)
    assert run.status().state == "stopping"
    _held_by(run, os.getpid(), state="stopped")
    assert run.status().state == "stopped"


def test_a_stop_from_before_does_not_end_what_a_worker_was_started_for(run: Run):
    request_stop(run)
    reporter = Reporter(run, verbose=False)
    try:
        reporter.say(stage="Measuring on test text")
        reporter.check_stop()
        assert run.status().state == "running"
        time.sleep(0.02)  # two stops within a tick of the file system's clock would look like one
        request_stop(run)
        assert run.status().state == "stopping"
        with pytest.raises(Cancelled):
            reporter.check_stop()
        run.pause_marker.unlink()
        reporter.check_stop()
        request_stop(run)
        with pytest.raises(Cancelled):
            reporter.check_stop()
    finally:
        reporter.close("stopped")


@pytest.mark.parametrize("content", ['{"done": "blue"}', '{"warnings": null}', "{"])
def test_a_damaged_status_is_told(run: Run, content: str):
    (run.path / "status.json").write_text(content)
    with pytest.raises(RunError, match=r"status\.json"):
        run.status()


def test_fraction_of_a_stage():
    assert RunStatus().fraction is None
    assert RunStatus(done=1, total=4).fraction == 0.25
    assert replace(RunStatus(), done=5, total=4).fraction == 1.0


def test_log_and_events_are_kept_in_order(run: Run):
    assert run.log_tail() == ""
    (run.path / "worker.log").write_bytes(b"one\ntwo\nthr\xffee\n")
    assert run.log_tail(2) == "two\nthr\ufffdee"
    run.add_event("stage", name="a")
    run.add_event("stopped", message="b")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["stage", "stopped"]


# --- requests --------------------------------------------------------------------------------------------------------


def test_the_longest_of_each_stage_is_told_and_a_torn_line_is_passed_over(run):
    assert run.stage_seconds() == {}
    for seconds in (3.0, 0.01):
        run.add_event("stage", name="Calibrating", seconds=seconds)
    run.add_event("finished", message="")
    with (run.path / "events.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"kind": "stage", "name": "Fact')
    assert run.stage_seconds() == {"Calibrating": 3.0}


def test_requests_wait_in_order_until_they_are_answered(run: Run):
    _held_by(run, os.getpid())  # a worker that is never started
    first, second = submit(run, "compare", trial=3), submit(run, "generate", prompt="a")
    assert [request["id"] for request in pending_requests(run)] == [first, second]
    assert pending_requests(run)[0]["arguments"] == {"trial": 3}
    assert read_json(result_path(run, first)) is None
    write_json(run.path / "results" / f"{first}.json", {"ok": True})
    assert [request["id"] for request in pending_requests(run)] == [second]
    assert read_json(result_path(run, first)) == {"ok": True}


def test_a_recorded_run_is_looked_at_only(run: Run):
    _spoil_run(run, recorded=True)
    with pytest.raises(RunError, match="recording"):
        start_worker(run)
    with pytest.raises(RunError, match="recording"):
        submit(run, "compare")
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]

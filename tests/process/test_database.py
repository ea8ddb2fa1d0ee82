"""A study in a real PostgreSQL server: workers of several machines, one killed, and who may join."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from lowrank_core.errors import ConfigError
from lowrank_core.runs import Run, open_run
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studies.storage import dashboard_command, open_database, redacted
from lowrank_core.worker.joining import run_of_study

PATIENCE = 180.0


def _server_programs() -> Path | None:
    """Return the folder of initdb and postgres: Debian keeps them off the PATH."""
    result = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("initdb")
    return result[-1].parent if result else Path(on_path).parent if on_path else None


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Start a server of its own; return the URL of an empty database."""
    programs = _server_programs()
    if programs is None:
        if os.environ.get("LOWRANK_REQUIRE_POSTGRES"):
            pytest.fail("no PostgreSQL server is installed")
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(tempfile.mkdtemp(prefix="lowrank-postgres-"))
    owner = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        owner = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **owner}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "studio"], check=True, **quiet)
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(folder), "-p", str(port)]
    process = subprocess.Popen([programs / "postgres", "-D", folder / "data", *options], **quiet)
    try:
        _until(lambda: _answers(port), "answer")
        yield f"postgresql+psycopg://studio@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # does not wait for clients
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    try:
        psycopg.connect(f"host=127.0.0.1 port={port} user=studio dbname=postgres", connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"did not {what} in {PATIENCE:.0f} s"
        time.sleep(0.05)


class Machine:
    """Processes with a home of their own: nothing is shared with others but the database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def lowrank(self, *arguments: object) -> subprocess.Popen[bytes]:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "out").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "lowrank_core", *map(str, arguments)],
                env={**os.environ, "LOWRANK_HOME": str(self.folder)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    @property
    def said(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[], Machine]]:
    result: list[Machine] = []

    def machine() -> Machine:
        result.append(Machine(tmp_path / f"machine-{len(result)}"))
        return result[-1]

    yield machine
    for process in (process for machine in result for process in machine.processes):
        if process.poll() is None:
            process.kill()
        process.wait()


def _search(machine: Machine, server: str, model: Path, text: Path, run: Path, trials: int) -> subprocess.Popen[bytes]:
    where = ["--model", model, "--text", f"file:{text}", "--context", 32, "--windows", 40]
    how = ["--compression-ratio", 0.3, "--basis", "pooled_feature", "--trials", trials, "--confirmed", 0]
    return machine.lowrank("search", *where, *how, "--run", run, "--storage-url", server)


def _complete(run: Run) -> list[TrialRecord]:
    return [trial for trial in read_trials(run) if trial.state == "complete"]


def _frozen_in_a_trial(run: Run, process: psutil.Process) -> int:
    """Stop ``process`` in the middle of a trial, and return its number."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        process.suspend()
        mine = [t.number for t in read_trials(run) if t.state == "running" and t.ranks and t.worker.endswith(f":{process.pid}")]
        if mine:
            return mine[0]
        process.resume()
        time.sleep(0.01)
    raise AssertionError("it was not seen in a trial")


@pytest.mark.slow
def test_three_workers_of_which_one_is_killed(
    server: str, machines: Callable[[], Machine], llama_checkpoint: Path, text_file: Path, tmp_path: Path
):
    folder = tmp_path / "of-three"
    leader, second, third = machines(), machines(), machines()
    first = _search(leader, server, llama_checkpoint, text_file, folder, trials=300)
    _until(lambda: (folder / "storage.json").exists() and _complete(open_run(folder)), "begin")
    run = open_run(folder)
    assert not run.journal.exists()
    helpers = [machine.lowrank("worker", "--storage-url", server, "--study", run.id) for machine in (second, third)]
    _until(lambda: len({trial.worker for trial in _complete(run)}) == 3, "have three workers")
    victim = psutil.Process(helpers[1].pid)
    lost = _frozen_in_a_trial(run, victim)
    before = {trial.number: trial for trial in _complete(run)}
    victim.kill()
    run.change_search(trials=len(before) + 12)
    for process in (first, helpers[0]):
        assert process.wait(PATIENCE) == 0, leader.said + second.said
    trials = read_trials(run)
    by_number = {trial.number: trial for trial in trials}
    assert len(by_number) == len(trials)
    assert {number: by_number[number] for number in before} == before  # nothing that was complete changed
    assert by_number[lost].state == "failed"
    again = [trial for trial in trials if trial.number > lost and trial.params == by_number[lost].params]
    assert [trial.state for trial in again] == ["complete"]  # the lost one was measured once more
    assert {trial.state for trial in trials} == {"complete", "failed"}
    assert len(before) + 12 <= len(_complete(run)) <= len(before) + 15  # who began a last trial may finish it
    assert "Traceback" not in leader.said + second.said + third.said


@pytest.fixture
def begun(server: str, machines: Callable[[], Machine], llama_checkpoint: Path, text_file: Path, tmp_path: Path) -> Run:
    folder = tmp_path / f"study-{os.urandom(3).hex()}"
    machine = machines()
    assert _search(machine, server, llama_checkpoint, text_file, folder, trials=3).wait(PATIENCE) == 0, machine.said
    return open_run(folder)


@pytest.mark.slow
def test_who_has_another_model_or_text_may_not_join(
    server: str, begun: Run, machines: Callable[[], Machine], qwen2_checkpoint: Path, text_file: Path, tmp_path: Path
):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    begun.change_search(trials=20)
    for option, value, message in (
        ("--model", qwen2_checkpoint, "the configuration of its model differs"),
        ("--text", f"file:{other}", "the tokens of its calibration text differ"),
    ):
        machine = machines()
        assert machine.lowrank("worker", "--storage-url", server, "--study", begun.id, option, value).wait(PATIENCE) == 2
        assert "can't join" in machine.said
        assert message in machine.said
    assert len(read_trials(begun)) == 3


def test_the_pages_read_a_study_in_a_database(begun: Run):
    trials = read_trials(begun)
    assert [trial.state for trial in trials] == ["complete"] * 3
    assert trials[0].windows
    assert dashboard_command(begun).startswith("optuna-dashboard postgresql+psycopg://studio@127.0.0.1")


def test_a_study_that_nobody_began_is_told(server: str, begun: Run):
    with pytest.raises(ConfigError, match=f"no study 'nowhere' that a search has begun; there are: .*{begun.id}"):
        run_of_study(server, "nowhere")


def test_a_server_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"can't open the storage postgresql\+psycopg://me:\*\*\*@127.0.0.1:9/x: .*Is the server up"):
        open_database("postgresql+psycopg://me:secret@127.0.0.1:9/x")


@pytest.mark.parametrize(("url", "message"), [("nothing", "has no scheme"), ("postgresql+nodriver://h/x", "can't open|is missing")])
def test_bad_urls_are_told(url: str, message: str):
    with pytest.raises(ConfigError, match=message):
        open_database(url)


def test_a_password_is_not_shown():
    assert redacted("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert redacted("postgresql://me@host/db") == "postgresql://me@host/db"


def test_where_a_study_is_kept_is_its_owners_alone(tmp_path: Path):
    run = Run(tmp_path)
    run.keep_study_at("postgresql://me:secret@host/db", "mine")
    assert (run.storage_url, run.study_name) == ("postgresql://me:secret@host/db", "mine")
    assert (tmp_path / "storage.json").stat().st_mode & 0o077 == 0

"""The worker: a process of its own that can be stopped, resumed, asked, and killed at any moment."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from lowrank_core.allocation.curves import CURVES_FILE, load_curves
from lowrank_core.allocation.units import plan_units
from lowrank_core.cli import main
from lowrank_core.config import (
    SAMPLERS,
    VARIABLES,
    CalibrationConfig,
    CompressionConfig,
    ExportConfig,
    ModelSource,
    RunConfig,
    SearchConfig,
    TextConfig,
)
from lowrank_core.errors import BudgetError, Cancelled, ConfigError, ModelError, RunError
from lowrank_core.export import read_manifest
from lowrank_core.models import load_model
from lowrank_core.runs import Run, client, create_run, read_json
from lowrank_core.runs.client import results
from lowrank_core.search.study import open_study
from lowrank_core.spectra.spectrum import load_spectra
from lowrank_core.studies.gain import search_gain
from lowrank_core.studies.records import MANUAL, TrialRecord, best_trial, pareto_front, read_trials
from lowrank_core.studies.space import BASELINES
from lowrank_core.studio.compare.comparison import comparisons
from lowrank_core.studio.compare.healing_commands import healing_commands
from lowrank_core.studio.compare.healing_runs import healings
from lowrank_core.studio.export.export_plan import healed_sources
from lowrank_core.studio.manual.starting_points import Recipe
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.studio.spectra.top_directions import direction_facts
from lowrank_core.worker.context import complete_trial
from lowrank_core.worker.joining import join_run
from lowrank_core.worker.main import run_worker
from lowrank_core.worker.reporter import Reporter

PATIENCE = 120.0
"""Seconds to wait for a process that shares the machine with others; far more than it takes alone."""


@pytest.fixture
def config(llama_checkpoint: Path, text_file: Path) -> RunConfig:
    return RunConfig(
        model=ModelSource(str(llama_checkpoint)),
        text=TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6),
        calibration=CalibrationConfig(group_size=8, precision="float32"),  # as commands in this process have it
        search=SearchConfig(compression_ratio=0.3, trials=6, startup_trials=3),
    )


def _search(config: RunConfig, **changes: object) -> RunConfig:
    assert config.search is not None
    return replace(config, search=replace(config.search, **changes))  # type: ignore[arg-type]


@pytest.fixture
def started() -> Iterator[Callable[[RunConfig], Run]]:
    """Make a run and start its worker as a process; the process is gone after the test."""
    runs: list[Run] = []

    def start(config: RunConfig) -> Run:
        runs.append(create_run(config))
        client.start_worker(runs[-1])
        return runs[-1]

    yield start
    for run in runs:
        _until(run, lambda run=run: run.status().pid is not None or not run.worker_alive(), "come up")
        if run.status().pid != os.getpid():  # should a test fail to be refused the run
            client.terminate(run)


def _until(run: Run, condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not {what} in {PATIENCE:.0f} s: {run.status()}\n{run.log_tail()}")
        time.sleep(0.02)


def _complete(run: Run) -> list[TrialRecord]:
    return [trial for trial in read_trials(run) if trial.state == "complete"]


def _answer(run: Run, kind: str, **arguments: object) -> dict[str, object]:
    request = client.submit(run, kind, **arguments)
    _until(run, lambda: read_json(client.result_path(run, request)), f"answer {kind}")
    answer = read_json(client.result_path(run, request))
    assert answer is not None
    return answer


# --- a process of its own --------------------------------------------------------------------------------------------


def test_a_search_is_stopped_asked_and_resumed(config: RunConfig, started: Callable[[RunConfig], Run]):
    run = started(_search(config, trials=24))
    assert run.status().state == "queued"
    _until(run, lambda: len(_complete(run)) >= 3, "complete three trials")
    status = run.status()
    assert (status.state, status.total) == ("running", 24)
    assert status.stage in ("Searching (random start)", "Searching (Gaussian process)")
    assert status.pid is not None
    assert psutil.Process(status.pid).create_time() == status.pid_started
    assert {"Loading the model", "Reading the text", "Calibrating"} <= set(status.timings or {})
    assert all(run.part(name) for name in ("model", "text", "calibration"))
    assert len(load_spectra(run.path / "spectra.npz")) == 14

    client.request_stop(run)
    _until(run, lambda: run.status().state == "stopped", "stop")
    assert 3 <= len(_complete(run)) < 24
    at_stop = read_trials(run)
    beat = run.status().heartbeat
    _until(run, lambda: run.status().heartbeat > beat, "beat")
    _check_answers(run)
    with pytest.raises(RunError, match="another worker holds"):
        run_worker(run, verbose=False)
    assert run.status().state == "stopped"
    assert read_trials(run) == at_stop  # requests moved nothing on

    client.start_worker(run)
    _until(run, lambda: run.status().state == "idle", "finish")
    trials = read_trials(run)
    assert trials[: len(at_stop)] == at_stop
    assert len(trials) == len(_complete(run)) == 24
    assert run.status().pid == status.pid  # the same warm process
    assert "Traceback" not in run.log_tail(1000)


def test_a_trial_is_healed_written_and_found_again(config: RunConfig, started: Callable[[RunConfig], Run]):
    run = started(_search(config, compression_ratio=0.5, trials=3, confirmed=0))
    _until(run, lambda: run.status().state == "idle", "finish")
    settings = {"method": "distill", "steps": 24, "batch_size": 4, "validate_every": 4}
    first = _answer(run, "heal", trial=1, healing=settings)
    assert first["ok"], first
    (healing,) = healings(run)
    assert healing.report is not None
    assert healing.report.kl_after < healing.report.kl_before
    assert [point.step for point in healing.history] == [point.step for point in healing.report.history]
    one_shot, healed = first["one_shot"], first["report"]
    assert isinstance(one_shot, dict)
    assert isinstance(healed, dict)
    assert healed["dense_perplexity"] == one_shot["dense_perplexity"]
    assert healed["compressible_parameters"] == one_shot["compressible_parameters"]
    assert load_model(ModelSource(str(first["path"]))).linear_parameters == healed["compressible_parameters"]
    result = {(comparison.form, comparison.perplexity) for comparison in comparisons(results(run))}
    assert result == {("one-shot", one_shot["perplexity"]), ("healed", healed["perplexity"])}

    again = _answer(run, "heal", trial=1, healing=settings)  # nothing is trained twice
    assert again["ok"], again
    assert again["path"] == first["path"]
    assert len(healings(run)) == 1
    proven = _answer(run, "verify", path=Path(str(first["path"])).name)
    assert proven["ok"], proven
    assert isinstance(proven["verification"], dict)
    assert proven["verification"]["ok"]
    _check_another_form(run, Path(str(first["path"])))
    refused = _answer(run, "heal", trial=1, healing={"method": "magic"})
    assert "method must be one of" in str(refused["error"])


def test_the_two_commands_of_a_healing_give_it_again(
    config: RunConfig,
    started: Callable[[RunConfig], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    usual = replace(config, text=replace(config.text, validation_windows=TextConfig().validation_windows))
    run = started(_search(usual, compression_ratio=0.5, trials=2, confirmed=0))
    _until(run, lambda: run.status().state == "idle", "finish")
    first = _answer(run, "heal", trial=1, healing={"steps": 12, "batch_size": 4, "validate_every": 4, "cross_entropy": 0.1, "seed": 3})
    assert first["ok"], first
    (source,) = healed_sources(run, read_trials(run))
    lines = healing_commands(run, source, ExportConfig(dtype="float32")).lines.splitlines()
    monkeypatch.chdir(tmp_path)
    assert [main([*shlex.split(line)[1:], "--json"]) for line in lines] == [0, 0]
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    for ours, theirs in (("one_shot", "one_shot"), ("report", "healed")):
        reported = first[ours]
        assert isinstance(reported, dict)
        for figure in ("kl", "perplexity", "dense_perplexity"):
            assert again[theirs][figure] == pytest.approx(reported[figure], rel=1e-4)
    healing = first["healing"]
    assert isinstance(healing, dict)
    assert again["healing"]["tokens"] == healing["tokens"]
    assert again["healing"]["kl_after"] == pytest.approx(healing["kl_after"], rel=1e-4)
    assert again["healing"]["best_step"] == healing["best_step"] > 0  # it was trained


def _check_another_form(run: Run, healed: Path) -> None:
    """A healed model is written in 8 bits from what is on disk; what was not healed is no healed model."""
    small = _answer(run, "export", healed=healed.name, quantization="int8")
    assert small["ok"], small
    folder = Path(str(small["path"]))
    assert folder.name == f"{healed.name}-int8"
    before, after = read_manifest(healed), read_manifest(folder)
    assert after.provenance == before.provenance
    assert after.made_from == before.made_from
    assert after.written_bytes < before.written_bytes
    assert after.measured is not None
    assert before.measured is not None
    assert abs(after.measured.nll - before.measured.nll) < 0.05
    assert {str(source.healed) for source in healed_sources(run, read_trials(run))} == {healed.name}
    for name in ("uniform", "..", ""):
        assert not _answer(run, "export", healed=name)["ok"], name


def test_a_healing_that_is_stopped_goes_on_when_it_is_asked_for_again(config: RunConfig, started: Callable[[RunConfig], Run]):
    run = started(_search(config, compression_ratio=0.5, trials=2, confirmed=0))
    _until(run, lambda: run.status().state == "idle", "finish")
    settings = {"steps": 400, "batch_size": 4, "validate_every": 10, "patience": 999}
    request = client.submit(run, "heal", trial="uniform", healing=settings)
    _until(run, lambda: healings(run) and len(healings(run)[0].history) > 2, "validate twice")
    client.request_stop(run)
    _until(run, lambda: read_json(client.result_path(run, request)), "stop")
    stopped = read_json(client.result_path(run, request))
    assert stopped is not None
    assert "Stopped before it was done" in str(stopped["error"])
    _until(run, lambda: not run.worker_alive(), "end")
    (before,) = healings(run)
    assert before.report is None
    client.start_worker(run)
    finished = _answer(run, "heal", trial="uniform", healing=settings)
    assert finished["ok"], finished
    (after,) = healings(run)
    timeless = [replace(point, seconds=0.0) for point in after.history]
    assert timeless[: len(before.history)] == [replace(point, seconds=0.0) for point in before.history]
    assert after.history[-1].step == 400


def _check_answers(run: Run) -> None:
    compared = _answer(run, "compare", trial="uniform")
    assert compared["ok"], compared
    report = compared["report"]
    assert isinstance(report, dict)
    assert report["split"] == "test"
    assert report["kl"] > 0
    generated = _answer(run, "generate", trial="best", prompt="the rank", tokens=4)
    assert generated["ok"], generated
    assert isinstance(generated["dense_text"], str)
    exported = _answer(run, "export", trial=1)
    assert exported["ok"], exported
    assert load_model(ModelSource(str(exported["path"]))).linear_parameters == report["compressible_parameters"]
    bad = {
        "trial 99": _answer(run, "compare", trial=99),
        "trial must be a number": _answer(run, "export", trial="finest"),
        "tokens": _answer(run, "generate", trial=0, prompt="a", tokens=10**6),
        "no request is called 'shrink'": _answer(run, "shrink"),
    }
    for message, answer in bad.items():
        assert answer["ok"] is False
        assert message in str(answer["error"])


def test_a_killed_worker_loses_one_trial(config: RunConfig, started: Callable[[RunConfig], Run]):
    run = started(_search(config, trials=16))
    _until(run, lambda: len(_complete(run)) >= 3, "complete three trials")
    process = psutil.Process(run.status().pid)
    _freeze_in_a_trial(run, process)
    before = _complete(run)
    process.kill()
    _until(run, lambda: run.status().state == "interrupted", "be seen as dead")

    client.start_worker(run)
    _until(run, lambda: run.status().state == "idle", "finish")
    trials = read_trials(run)
    assert [trial for trial in trials if trial.number in {t.number for t in before}] == before
    assert len(_complete(run)) == 16
    assert [trial.state for trial in trials if trial.state != "complete"] == ["failed"]
    assert [sum(trial.label == name for trial in _complete(run)) for name in BASELINES] == [1, 1, 1]
    assert len({trial.number for trial in trials}) == len(trials)


def _freeze_in_a_trial(run: Run, process: psutil.Process) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        process.suspend()
        if any(trial.state == "running" for trial in read_trials(run)):
            return
        process.resume()
        time.sleep(0.003)
    raise AssertionError(f"no trial was seen running: {run.status()}")


def test_a_worker_that_can_not_start_says_why(config: RunConfig, started: Callable[[RunConfig], Run], tmp_path: Path):
    run = started(replace(config, model=ModelSource(str(tmp_path / "nowhere"))))
    _until(run, lambda: run.status().state == "failed", "fail")
    assert "there is no folder" in run.status().message
    assert "Traceback" not in run.log_tail()


def test_a_further_worker_takes_trials(config: RunConfig, started: Callable[[RunConfig], Run]):
    run = started(_search(config, trials=4000, sampler="random", confirmed=0))
    _until(run, lambda: len(_complete(run)) >= 1, "complete a trial")
    client.add_worker(run)
    _until(run, lambda: len({trial.worker for trial in _complete(run)}) == 2, "have two workers")
    assert [worker.stage.split(" (")[0] for worker in run.further_workers().values()] == ["Searching"]
    run.change_search(trials=len(_complete(run)) + 150)  # far enough that trials of milliseconds do not run past it before it is read
    _until(run, lambda: run.status().state == "idle", "finish")
    trials = read_trials(run)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert {trial.state for trial in trials} == {"complete"}
    wanted = run.config.search.trials  # type: ignore[union-attr]
    assert wanted <= len(trials) <= wanted + 1  # both may have begun the last one
    assert "Traceback" not in run.log_tail(1000)


def test_nobody_joins_where_nobody_works(config: RunConfig):
    run = create_run(config)
    with pytest.raises(RunError, match="nobody works on"):
        client.add_worker(run)
    with pytest.raises(RunError, match="there is nothing to join"):
        join_run(run, verbose=False)
    assert list(run.workers_folder.iterdir()) == []


def test_who_has_other_text_may_not_join(config: RunConfig, text_file: Path, tmp_path: Path):
    run, before = _searched(_search(config, trials=3))
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    record = run.record
    record["config"]["text"]["reference"] = f"file:{other}"
    (run.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="this worker can't join: the tokens of its calibration text differ"):
        join_run(run, verbose=False)
    assert read_trials(run) == before


# --- in this process -------------------------------------------------------------------------------------------------


def _searched(config: RunConfig) -> tuple[Run, list[TrialRecord]]:
    run = create_run(config)
    run_worker(run, verbose=False)
    assert run.status().state == "finished"
    return run, read_trials(run)


def _figures(trials: list[TrialRecord]) -> list[tuple[object, ...]]:
    return [(t.number, t.label, t.state, t.params, t.ranks, t.value, t.kl, t.perplexity) for t in trials]


def test_the_same_seed_gives_the_same_trials(config: RunConfig):
    _, first = _searched(_search(config, trials=8))
    _, second = _searched(_search(config, trials=8))
    assert _figures(first) == _figures(second)  # bit for bit
    assert len({tuple(trial.ranks.values()) for trial in first}) == 8


def test_another_seed_gives_other_trials(config: RunConfig):
    _, first = _searched(_search(config, trials=5))
    _, second = _searched(_search(config, trials=5, seed=1))
    assert _figures(first)[:3] == _figures(second)[:3]  # the baselines do not depend on it
    assert _figures(first)[3:] != _figures(second)[3:]


@pytest.mark.parametrize(
    ("objective", "sampler", "variables"),
    [
        *(("kl", sampler, variables) for sampler in SAMPLERS for variables in VARIABLES),
        ("perplexity", "gp", "keep_ratio"),
        ("bolaco", "gp", "keep_ratio"),
    ],
)
def test_every_objective_sampler_and_variable_searches_within_the_budget(config: RunConfig, objective: str, sampler: str, variables: str):
    _, trials = _searched(_search(config, trials=5, startup_trials=1, objective=objective, sampler=sampler, variables=variables))
    assert [trial.label for trial in trials] == [*BASELINES, "sampled", "sampled"]
    assert len({tuple(trial.params.values()) for trial in trials[3:]}) == 2
    assert all(trial.compression_ratio is not None and trial.compression_ratio >= 0.3 for trial in trials)
    best = best_trial(trials)
    assert best is not None
    assert all(best.value <= trial.value for trial in trials)  # type: ignore[operator]
    measured = {"kl": [trial.kl for trial in trials], "perplexity": [trial.perplexity for trial in trials]}
    if objective in measured:
        assert [trial.value for trial in trials] == pytest.approx(measured[objective])


def test_a_search_reuses_the_statistics_of_an_analysis(config: RunConfig, lowrank_home: Path):
    analysis = create_run(replace(config, search=None))
    run_worker(analysis, verbose=False)
    assert analysis.status().state == "finished"
    assert read_trials(analysis) == []
    stored = list((lowrank_home / "statistics").iterdir())
    run, _ = _searched(_search(config, trials=2))
    first, second = analysis.part("calibration"), run.part("calibration")
    assert first is not None
    assert second is not None
    assert (first["cached"], second["cached"]) == (False, True)
    assert [path for path in (lowrank_home / "statistics").iterdir() if not path.name.startswith("factors-")] == stored
    assert first["inputs"] == second["inputs"]


def test_other_text_or_seed_is_calibrated_anew(config: RunConfig):
    _searched(_search(config, trials=1))
    run, _ = _searched(_search(replace(config, text=replace(config.text, seed=1)), trials=1))
    assert run.part("calibration")["cached"] is False  # type: ignore[index]


def test_an_analysis_answers_that_it_has_no_trials(config: RunConfig):
    run = create_run(replace(config, search=None))
    request = client.submit(run, "compare", launch=False)
    run_worker(run, verbose=False)
    answer = read_json(client.result_path(run, request))
    assert answer is not None
    assert answer["ok"] is False
    assert "Start a rank search first" in str(answer["error"])


def test_a_stop_in_the_middle_of_a_stage_keeps_what_is_done(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    run = create_run(config)

    def stop_when_calibrating(self: Reporter, name: str, total: int = 0, original: Callable[..., object] = Reporter.stage) -> object:
        if name == "Calibrating":
            client.request_stop(run)
        return original(self, name, total)

    monkeypatch.setattr(Reporter, "stage", stop_when_calibrating)
    with pytest.raises(Cancelled):
        run_worker(run, verbose=False)
    assert run.status().state == "stopped"
    assert run.part("model") is not None
    assert run.part("calibration") is None
    monkeypatch.undo()
    monkeypatch.setenv("LOWRANK_HOME", str(run.path.parents[1]))
    run.pause_marker.unlink()
    run_worker(run, verbose=False)
    assert len(_complete(run)) == 6


def test_a_finished_search_measures_nothing_again(config: RunConfig):
    run, before = _searched(_search(config, trials=3))
    run_worker(run, verbose=False)
    assert read_trials(run) == before


def test_a_baseline_lost_in_flight_is_measured_once_more(config: RunConfig):
    run, _ = _searched(_search(config, trials=1))  # uniform is complete, lord_manual waits
    assert config.search is not None
    _, bench = run_worker(run, verbose=False)
    assert bench is not None
    study = open_study(run, config.search, bench.space)
    lost = study.ask(dict(bench.space.distributions()))  # and its worker dies
    assert lost.user_attrs["label"] == "lord_manual"
    for _ in range(2):  # opening twice enqueues once
        open_study(run, config.search, bench.space)
    states = [(trial.label, trial.state) for trial in read_trials(run)]
    waiting = [("lagrangian", "waiting"), ("lord_manual", "waiting")]
    assert states == [("uniform", "complete"), ("lord_manual", "failed"), *waiting]


def test_what_a_kill_leaves_in_the_journal_is_cleared(config: RunConfig):
    run, before = _searched(_search(config, trials=3))
    Path(f"{run.journal}.lock").symlink_to(run.journal)  # Optuna's
    whole = run.journal.read_bytes()
    run.journal.write_bytes(whole + b'{"op_code": 8, "wor')
    run.change_search(trials=5)
    began = time.monotonic()
    run_worker(run, verbose=False)
    assert time.monotonic() - began < 25  # Optuna would wait 30 s for the lock
    assert run.journal.read_bytes().startswith(whole)
    assert read_trials(run)[:3] == before
    assert len(_complete(run)) == 5


def test_a_recorded_run_is_not_continued(config: RunConfig):
    run = create_run(config)
    (run.path / "run.json").write_text(json.dumps(run.record | {"recorded": True}))
    for start in (run_worker, client.start_worker):
        with pytest.raises(RunError, match="recording"):
            start(run)
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]


def test_failures_are_kept_as_the_runs_last_word(config: RunConfig, tmp_path: Path):
    run = create_run(replace(config, model=ModelSource(str(tmp_path / "nowhere"))))
    with pytest.raises(ModelError, match="there is no folder"):
        run_worker(run, verbose=False)
    assert run.status().state == "failed"
    assert "there is no folder" in run.status().message

    impossible = create_run(_search(config, compression_ratio=0.95))
    with pytest.raises(BudgetError, match=r"0\.95 can't be met"):
        run_worker(impossible, verbose=False)
    assert impossible.status().state == "failed"
    assert not impossible.journal.exists()


def test_values_can_be_compressed_too(config: RunConfig):
    _, trials = _searched(_search(config, trials=1, compression=CompressionConfig(value_dense=False)))
    assert any(rank is not None for name, rank in trials[0].ranks.items() if name.endswith("v_proj"))
    assert "v" in trials[0].params


# --- the sampler's part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(config: RunConfig, sampler: str):
    """Bit for bit: what is proposed depends on the seed, the trial's number and the trials before."""
    _, whole = _searched(_search(config, trials=10, startup_trials=4, sampler=sampler))
    run, _ = _searched(_search(config, trials=6, startup_trials=4, sampler=sampler))
    run.change_search(trials=10)
    run_worker(run, verbose=False)
    assert _figures(read_trials(run)) == _figures(whole)


def test_the_sampler_can_be_changed_in_between(config: RunConfig):
    run, before = _searched(_search(config, trials=6))
    run.change_search(trials=9, sampler="tpe")
    run_worker(run, verbose=False)
    after = read_trials(run)
    assert after[:6] == before
    assert len(_complete(run)) == 9
    _, other = _searched(_search(config, trials=9))
    assert _figures(after)[6:] != _figures(other)[6:]


def test_hand_picked_allocations_are_measured_and_hidden_from_the_sampler(config: RunConfig):
    _, alone = _searched(_search(config, trials=8))
    run = create_run(_search(config, trials=8))
    ranks = {name: 5 for name in alone[0].ranks if alone[0].ranks[name] is not None}
    request = client.submit(run, "measure", launch=False, ranks=ranks)
    run_worker(run, verbose=False)
    trials = read_trials(run)
    answer = read_json(client.result_path(run, request))
    assert answer is not None
    assert answer["ok"]
    mine = [trial for trial in trials if trial.label == MANUAL]
    assert [(trial.state, {n: r for n, r in trial.ranks.items() if r is not None}) for trial in mine] == [("complete", ranks)]
    assert [trial.label for trial in trials if trial.label != "sampled"] == [*BASELINES, MANUAL]
    assert len(trials) == 9  # it comes on top
    assert {trial.label for trial in trials if trial.params} == {"uniform", "lord_manual", "sampled"}


def test_a_hand_picked_allocation_over_the_budget_is_measured_and_never_the_best(config: RunConfig):
    run, _ = _searched(_search(config, trials=3))
    client.submit(run, "measure", launch=False, ranks={})  # everything dense
    run_worker(run, verbose=False)
    mine = read_trials(run)[-1]
    assert (mine.label, mine.state, mine.compression_ratio) == (MANUAL, "infeasible", 0)
    assert mine.kl == pytest.approx(0, abs=1e-6)
    best = best_trial(read_trials(run))
    assert best is not None
    assert best.number < 3


@pytest.mark.parametrize(
    ("basis", "error_weights", "estimate"), [("two_sided", False, "kl"), ("whitened", True, "error_weights"), ("whitened", False, "own")]
)
def test_a_search_leaves_the_curves_that_its_rules_trade(config: RunConfig, basis: str, error_weights: bool, estimate: str):
    """A page that reads the file chooses as the worker did, and a run of an older version gets one when it is asked for."""
    compression = CompressionConfig(basis=basis, storage="pivoted", value_dense=False, stacks=True, heads=True)
    run, trials = _searched(_search(config, trials=3, variables="error_weight", error_weights=error_weights, compression=compression))
    path = run.path / CURVES_FILE
    record, facts, search = load_curves(path), model_facts(run), run.config.search
    assert record is not None
    assert facts is not None
    assert search is not None
    assert (record.basis, record.estimate, len(record.influence)) == (basis, estimate, facts.blocks)
    recipe = Recipe(plan_units(facts.matrices, compression, facts.joint_units), search, record)
    mine = {rank for rank in recipe.ruled("lagrangian", 0.3).ranks.items() if rank[1] is not None}
    lagrangian = next(trial for trial in trials if trial.label == "lagrangian")
    assert mine == {rank for rank in lagrangian.ranks.items() if rank[1] is not None}
    path.unlink()
    request = client.submit(run, "curves", launch=False)
    run_worker(run, verbose=False)
    answer = read_json(client.result_path(run, request))
    assert answer is not None
    assert answer["estimate"] == estimate
    again = load_curves(path)
    assert again is not None
    assert all(np.array_equal(curve, again.curves[name]) for name, curve in record.curves.items())


def test_a_partial_choice_is_completed_within_the_budget(config: RunConfig):
    run, trials = _searched(_search(config, trials=3))
    name = next(iter(trials[0].ranks))
    request = client.submit(run, "measure", launch=False, ranks={name: 3}, complete="uniform")
    bad = client.submit(run, "measure", launch=False, ranks={"nowhere": 3}, complete="uniform")
    worse = client.submit(run, "measure", launch=False, ranks={name: 2.5})
    run_worker(run, verbose=False)
    results = [read_json(client.result_path(run, asked)) for asked in (request, bad, worse)]
    assert [answer["ok"] for answer in results] == [True, False, False]  # type: ignore[index]
    assert "nowhere" in str(results[1])
    assert "whole ranks" in str(results[2])
    mine = read_trials(run)[-1]
    assert mine.ranks[name] == 3
    assert mine.state == "complete"
    assert mine.compression_ratio == pytest.approx(0.3, abs=0.02)


def test_the_best_trials_are_measured_on_test_text_once(config: RunConfig):
    run, _ = _searched(_search(config, trials=6, confirmed=2))
    best = sorted(_complete(run), key=lambda trial: trial.value or 0.0)

    def confirmed() -> list[object]:
        return [json.loads(path.read_text()) for path in sorted((run.path / "results").iterdir())]

    first = confirmed()
    compared = [trial for trial in search_gain(run).rivals if trial not in best[:2]]
    assert [answer["trial"] for answer in first] == [trial.number for trial in [*best[:2], *compared]]  # type: ignore[index,call-overload]
    assert {answer["report"]["split"] for answer in first} == {"test"}  # type: ignore[index,call-overload]
    run_worker(run, verbose=False)
    assert confirmed() == first


def test_a_search_over_ratios_has_a_front(config: RunConfig):
    run, trials = _searched(_search(config, trials=14, max_ratio=0.6, variables="error_weight", startup_trials=3, confirmed=2))
    front = pareto_front(trials)
    assert len(front) >= 3
    ratios, values = [t.compression_ratio for t in front], [t.value for t in front]
    assert ratios == sorted(set(ratios))  # type: ignore[type-var]
    assert values == sorted(set(values))  # type: ignore[type-var]
    for trial in trials:
        assert any(f.value <= trial.value and f.compression_ratio >= trial.compression_ratio - 1e-3 for f in front)  # type: ignore[operator]
    assert all(0.2 < trial.compression_ratio < 0.62 for trial in trials)  # type: ignore[operator]
    assert len(list((run.path / "results").iterdir())) == 2
    with pytest.raises(ConfigError, match=r"no single best trial\. Choose one of its Pareto front"):
        complete_trial(run, None)


def test_windows_are_reported_and_bad_trials_stopped(config: RunConfig):
    text = replace(config.text, validation_windows=24)
    calibration = replace(config.calibration, batch_size=6)
    _, trials = _searched(
        _search(replace(config, text=text, calibration=calibration), trials=16, pruner="wilcoxon", sampler="random", seed=3)
    )
    complete, pruned = ([t for t in trials if t.state == state] for state in ("complete", "pruned"))
    assert len(complete) + len(pruned) == 16
    assert pruned
    for trial in complete:
        assert list(trial.windows) == list(range(24))
        assert trial.kl == pytest.approx(sum(trial.windows.values()) / 24)
    best = best_trial(trials)
    assert best is not None
    for trial in pruned:
        assert 6 <= len(trial.windows) < 24
        assert trial.value is None
        assert sum(trial.windows.values()) > sum(best.windows[w] for w in trial.windows)
    assert {trial.state for trial in trials[:3]} == {"complete"}  # baselines are measured whole


def test_the_top_directions_are_read_on_request_and_a_wrong_module_is_told(config: RunConfig) -> None:
    run = create_run(replace(config, search=None))
    name = "model.layers.1.mlp.up_proj"
    asked = [
        client.submit(run, "directions", launch=False, module=module, side="output", directions=2, windows=4)
        for module in (name, "no.such")
    ]
    run_worker(run, verbose=False)
    result, refused = (read_json(client.result_path(run, request)) for request in asked)
    assert result is not None
    assert refused is not None
    assert result["ok"]
    assert (result["module"], result["side"]) == (name, "output")
    assert [direction["number"] for direction in result["directions"]] == [1, 2]  # type: ignore[attr-defined]
    assert "4 windows of 32 tokens" in str(result["protocol"])
    assert not refused["ok"]
    assert "no compressible module 'no.such'" in str(refused["error"])
    shown = direction_facts(results(run), name, "output")
    assert shown is not None
    assert len(shown.frame) == 12

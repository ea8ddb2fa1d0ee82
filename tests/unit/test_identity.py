"""A run goes on, answers and exports with the model and the text that it was begun with, and with no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowrank_core.cli import main
from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig, to_mapping
from lowrank_core.errors import Cancelled, ConfigError, ModelError
from lowrank_core.models import load_model
from lowrank_core.runs import Run, client, create_run, open_run, read_json, write_json
from lowrank_core.sensitivity.config import SensitivityConfig
from lowrank_core.speed import SpeedConfig, compare_speed
from lowrank_core.studies.records import TrialRecord, read_trials
from lowrank_core.studies.storage import open_storage
from lowrank_core.worker.joining import join_run
from lowrank_core.worker.main import measure_alone, run_worker

WEIGHTS = "the weights of its model differ from what it was begun with"


@pytest.fixture
def model(llama_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama_checkpoint, tmp_path / "model")


@pytest.fixture
def text(text_file: Path, tmp_path: Path) -> Path:
    return shutil.copy(text_file, tmp_path / "text.txt")


def config_of(model: Path, text: Path) -> RunConfig:
    return RunConfig(
        model=ModelSource(str(model)),
        text=TextConfig(f"file:{text}", context=32, calibration_windows=40, validation_windows=4, test_windows=6),
        calibration=CalibrationConfig(group_size=8),
        search=SearchConfig(compression_ratio=0.3, trials=2, startup_trials=2, confirmed=0),
    )


@pytest.fixture
def config(model: Path, text: Path) -> RunConfig:
    return config_of(model, text)


@pytest.fixture(scope="module")
def searched(llama_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search that is finished, with the statistics in its home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(tmp_path_factory.mktemp("searched")))
        run = create_run(config_of(llama_checkpoint, text_file))
        run_worker(run, verbose=False)
    return run


@pytest.fixture
def run(searched: Run, config: RunConfig, lowrank_home: Path) -> Run:
    """A copy of it, of this test's own model and text."""
    shutil.copytree(searched.path.parents[1], lowrank_home, dirs_exist_ok=True)
    run = open_run(lowrank_home / "runs" / searched.id)
    _edit(run, config)
    return run


def scale(model: Path, by: float = 2.0) -> None:
    """Scale one matrix: the shapes, the configuration and the tokenizer stay."""
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= by
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def configure(model: Path) -> None:
    body = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**body, "rms_norm_eps": 0.1}), encoding="utf-8")


def respell(model: Path) -> None:
    """Give the tokenizer a word that the text does not have: all its tokens stay."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<unheard-of>"])
    tokenizer.save_pretrained(model)


def rewrite(text: Path, first: float, last: float) -> None:
    """Turn the words around in a part of the text."""
    content = text.read_text(encoding="utf-8")
    begin, end = int(first * len(content)), int(last * len(content))
    text.write_text(content[:begin] + content[begin:end].swapcase() + content[end:], encoding="utf-8")


def files(run: Run) -> dict[str, bytes]:
    """What was computed, whatever the worker says of itself."""
    names = ("model.json", "text.json", "calibration.json", "spectra.npz", "curves.npz", "identity.json")
    return {name: (run.path / name).read_bytes() for name in names if (run.path / name).exists()}


def complete(run: Run) -> list[TrialRecord]:
    return [trial for trial in read_trials(run) if trial.state == "complete"]


def stages(run: Run) -> list[str]:
    lines = (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["name"] for line in lines if (event := json.loads(line))["kind"] == "stage"]


def refused(run: Run, message: str, work: Callable[[], object] | None = None) -> str:
    """Check that the run refuses to work with ``message``, that nothing was computed, and that its files are as they were."""
    before, done = files(run), stages(run)
    with pytest.raises(ConfigError, match=message) as reported:
        (work or (lambda: run_worker(run, verbose=False)))()
    assert files(run) == before
    assert set(stages(run)[len(done) :]) <= {"Loading the model", "Reading the text", "Waiting for the first worker"}
    assert "\n" not in str(reported.value)
    return str(reported.value)


def test_a_changed_weight_is_refused_before_anything_is_measured(run: Run, model: Path):
    trials = read_trials(run)
    run.change_search(trials=4)
    scale(model)
    reported = refused(run, WEIGHTS)
    assert f"Put the old model back at {model}, or start a new run with `lowrank search`." in reported
    assert read_trials(run) == trials
    assert run.status().state == "failed"
    assert run.status().message == reported
    scale(model, 0.5)
    run_worker(run, verbose=False)
    assert len(complete(run)) == 4
    assert complete(run)[:2] == [trial for trial in trials if trial.state == "complete"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (configure, "the configuration of its model differs"),
        (respell, "the tokenizer of its model differs"),
    ],
)
def test_whatever_of_the_model_changed_is_named(run: Run, model: Path, spoil: Callable[[Path], None], message: str):
    spoil(model)
    assert f"Put the old model back at {model}" in refused(run, message)


@pytest.mark.parametrize(
    ("first", "last", "split"), [(0.0, 0.5, "calibration"), (0.62, 0.78, "validation"), (0.92, 1.0, "test")], ids=lambda value: str(value)
)
def test_whatever_split_of_the_text_changed_is_named(run: Run, text: Path, first: float, last: float, split: str):
    rewrite(text, first, last)
    assert f"Put the old text back at file:{text}" in refused(run, f"the tokens of its {split} text differ")


def _edit(run: Run, config: RunConfig) -> None:
    write_json(run.path / "run.json", {**run.record, "config": to_mapping(config)})


def test_settings_that_were_edited_by_hand_are_refused(run: Run):
    config = run.config
    assert config.search is not None
    _edit(run, replace(config, calibration=replace(config.calibration, group_size=4)))
    assert "run.json" in refused(run, "the settings of its calibration differ")
    _edit(run, replace(config, model=replace(config.model, dtype="bfloat16")))
    assert "Give --device and --dtype as before" in refused(run, r"the precision of its model differs .*\(bfloat16 here, float32 there\)")
    compression = replace(config.search.compression, basis="weight_svd")
    _edit(run, replace(config, search=replace(config.search, compression=compression, trials=9)))
    trials = read_trials(run)
    with pytest.raises(ConfigError, match="the errors of its factors differ"):
        run_worker(run, verbose=False)
    assert read_trials(run) == trials


def _as_before(run: Run, *, signed: bool, parts: bool) -> None:
    """Leave what earlier versions left: the study's short fingerprint, or the hashes that pages show, or neither."""
    (run.path / "identity.json").unlink()
    study = optuna.load_study(study_name=run.study_name, storage=open_storage(run))
    whole = json.loads(study.user_attrs["fingerprint"])
    short = {name: whole[name] for name in ("model", "text", "statistics", "energy")}
    study.set_user_attr("fingerprint", json.dumps(short if signed else {}))
    if not parts:
        (run.path / "model.json").unlink()
        (run.path / "text.json").unlink()


@pytest.mark.parametrize(("signed", "parts"), [(True, True), (True, False), (False, True)])
def test_a_run_of_an_earlier_version_is_compared_with_what_it_has(run: Run, model: Path, signed: bool, parts: bool):
    _as_before(run, signed=signed, parts=parts)
    run.change_search(trials=3)
    run_worker(run, verbose=False)  # unchanged: it goes on
    _as_before(run, signed=signed, parts=parts)
    scale(model)
    refused(run, WEIGHTS)


def test_a_run_that_knows_nothing_goes_on_and_knows_from_then_on(run: Run, model: Path):
    _as_before(run, signed=False, parts=False)
    run_worker(run, verbose=False)
    scale(model)
    refused(run, WEIGHTS)


def test_a_run_knows_its_model_before_it_is_calibrated(config: RunConfig, model: Path, monkeypatch: pytest.MonkeyPatch):
    run = create_run(config)

    def killed(*arguments: object, **options: object) -> None:
        raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr("lowrank_core.compression.pipeline.cached_statistics", killed)
        with pytest.raises(Cancelled):
            run_worker(run, verbose=False)
    known = read_json(run.path / "identity.json") or {}
    assert {"model", "config", "tokenizer", "dtype", "calibration", "validation", "test", "statistics"} == set(known)
    scale(model)
    refused(run, WEIGHTS)


# what a finished run answers


ASKED = {
    "compare": {"trial": 0},
    "other_text": {"trial": 0, "text": "stdlib"},
    "tokens": {"trial": 0, "window": 0},
    "generate": {"trial": 0, "prompt": "a"},
    "behaviour": {"trial": 0, "prompts": 2},
    "speed": {"trial": 0, "memory": False},
    "export": {"trial": 0},
    "verify": {"path": "trial-0"},
    "heal": {"trial": 0, "healing": {"steps": 1}},
    "measure": {"ranks": {}, "complete": "uniform"},
    "directions": {"module": "model.layers.0.mlp.down_proj"},
    "sensitivity": {},
    "curves": {},
}


def test_no_request_is_answered_with_another_model(run: Run, model: Path):
    requests = [client.submit(run, kind, launch=False, **arguments) for kind, arguments in ASKED.items()]
    trials = read_trials(run)
    scale(model)
    refused(run, WEIGHTS)
    assert not any(client.result_path(run, request).exists() for request in requests)
    assert {body["id"] for body in client.pending_requests(run)} == set(requests)
    assert read_trials(run) == trials


def test_comparisons_are_answered_on_the_same_test_text(run: Run, text: Path):
    client.submit(run, "compare", launch=False, trial=0)
    run_worker(run, verbose=False)
    rewrite(text, 0.92, 1.0)
    request = client.submit(run, "compare", launch=False, trial=1)
    refused(run, "the tokens of its test text differ")
    assert not client.result_path(run, request).exists()


def test_answers_on_a_second_text_are_on_the_same_tokens(run: Run, text: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    shutil.copy(text, other)

    def answer(trial: int) -> dict[str, object]:
        request = client.submit(run, "other_text", launch=False, trial=trial, text=f"file:{other}")
        run_worker(run, verbose=False)
        return read_json(client.result_path(run, request)) or {}

    first = answer(0)
    assert first["ok"]
    assert answer(1)["sha256"] == first["sha256"]
    rewrite(other, 0.92, 1.0)
    reported = answer(1)
    assert not reported["ok"]
    assert f"file:{other} has changed since models of this run were measured on it" in str(reported["error"])


def test_sensitivities_are_not_measured_of_another_model(run: Run, model: Path):
    scale(model)
    refused(run, WEIGHTS, lambda: measure_alone(run, SensitivityConfig(), verbose=False))
    assert not list((run.path / "sensitivity").glob("*"))


def test_an_analysis_goes_on_with_its_model_alone(config: RunConfig, model: Path, text: Path):
    run = create_run(replace(config, search=None))
    run_worker(run, verbose=False)
    run_worker(run, verbose=False)
    scale(model)
    refused(run, WEIGHTS)
    scale(model, 0.5)
    rewrite(text, 0.0, 0.5)
    refused(run, "the tokens of its calibration text differ")


@pytest.mark.parametrize(("change", "message"), [("model", WEIGHTS), ("text", "the tokens of its calibration text differ")])
def test_nothing_is_exported_from_another_model(run: Run, model: Path, text: Path, tmp_path: Path, capsys, change: str, message: str):
    export = ["export", "--run", str(run.path), "--trial", "0", "--out"]
    assert main([*export, str(tmp_path / "good")]) == 0
    scale(model) if change == "model" else rewrite(text, 0.0, 0.5)
    capsys.readouterr()
    assert main([*export, str(tmp_path / "bad")]) == 2
    said = capsys.readouterr().err
    assert f"nothing can be exported from this run: {message}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_a_further_worker_is_refused_before_it_calibrates(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Run, "worker_alive", lambda self: True)
    scale(model)
    reported = refused(run, f"this worker can't join: {WEIGHTS}", lambda: join_run(run, verbose=False))
    assert "Give it the same model and text" in reported


@pytest.mark.process
def test_memory_is_measured_of_the_model_that_is_timed(model: Path):
    handle = load_model(ModelSource(str(model)))
    config = SpeedConfig(prompt_tokens=4, new_tokens=2, rounds=1, warmup=1)
    scale(model)
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        compare_speed(handle, handle, config, sources=(ModelSource(str(model)),) * 2)


def test_versions_of_transformers_are_named_where_they_may_be_why(run: Run, model: Path):
    write_json(run.path / "run.json", {**run.record, "versions": {"transformers": "4.0.0"}})
    configure(model)
    assert "; transformers " in refused(run, "the configuration of its model differs")


def test_what_identifies_a_model_does_not_depend_on_its_place(model: Path, tmp_path: Path, config: RunConfig, run: Run):
    """A model that was moved is the same one."""
    moved = model.rename(tmp_path / "moved")
    _edit(run, replace(config, model=ModelSource(str(moved)), search=replace(config.search or SearchConfig(), trials=3)))
    run_worker(run, verbose=False)
    assert len(complete(run)) == 3

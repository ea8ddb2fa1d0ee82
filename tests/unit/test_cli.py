"""The command line: one JSON object on stdout, one line on stderr for bad input, and nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import VOCABULARY, save_checkpoint
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from lowrank_core import __version__
from lowrank_core.cli import main
from lowrank_core.metrics import METRICS
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.runs import open_run
from lowrank_core.studies.gain import search_gain
from lowrank_core.studies.records import read_trials

COMMANDS = (
    "analyze",
    "compress",
    "evaluate",
    "generate",
    "search",
    "sensitivity",
    "worker",
    "enqueue",
    "heal",
    "speed",
    "export",
    "verify",
    "report",
    "methods",
    "dashboard",
    "benchmark",
)
QUERY = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def body(self) -> dict[str, Any]:
        """The one JSON object."""
        assert self.status == 0, self.err
        body = json.loads(self.out)
        assert isinstance(body, dict)
        return body


def _lowrank(*arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Places:
    """The checkpoints, text and folders that commands are pointed at."""

    model: Path
    text: str
    folder: Path

    @property
    def source(self) -> list[str]:
        return ["--model", str(self.model), "--text", self.text, "--context", "32", "--windows", "40"]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def file(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        return path


@pytest.fixture
def places(llama_checkpoint: Path, text_file: Path, tmp_path: Path) -> Places:
    return Places(llama_checkpoint, f"file:{text_file}", tmp_path)


@pytest.fixture(scope="module")
def searched(
    llama_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Places, Path, dict[str, Any]]]:
    """A search of four trials by the command line, for the tests that only look at it."""
    places = Places(llama_checkpoint, f"file:{text_file}", tmp_path_factory.mktemp("searched"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_HOME", str(places.folder / "home"))
        run = places.folder / "run"
        outcome = _lowrank("search", *places.source, "--compression-ratio", 0.2, "--trials", 4, "--run", run, "--json")
        yield places, run, outcome.body


# --- help and results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str):
    outcome = _lowrank(command, "--help")
    assert outcome.status == 0
    assert f"lowrank {command}" in outcome.out
    assert outcome.err == ""


def test_help_and_version():
    assert all(command in _lowrank("--help").out for command in COMMANDS)
    assert __version__ in _lowrank("--version").out


def test_evaluate_gives_the_promised_keys(places: Places):
    outcome = _lowrank("evaluate", *places.source, "--json")
    promised = {"perplexity", "nll", "nll_stderr", "tokens", "windows", "context", "parameters", "compressible_parameters", "bytes"}
    assert promised <= set(outcome.body)
    assert outcome.out.count("\n") == 1
    assert outcome.body["tokens"] == outcome.body["windows"] * 31
    assert outcome.body["context"] == 32
    assert not {"dense_perplexity", "kl", "top1_agreement"} & set(outcome.body)


def test_evaluate_against_itself_finds_no_difference(places: Places):
    body = _lowrank("evaluate", *places.source, "--against", places.model, "--json").body
    assert body["dense_perplexity"] == body["perplexity"]
    assert body["kl"] == pytest.approx(0, abs=1e-9)
    assert body["top1_agreement"] == 1
    assert body["compression_ratio"] == 0


def test_evaluate_measures_the_split_that_was_asked_for(places: Places):
    bodies = [_lowrank("evaluate", *places.source, "--split", split, "--json").body for split in ("validation", "test", "all")]
    assert [body["split"] for body in bodies] == ["validation", "test", "all"]
    assert len({body["perplexity"] for body in bodies}) == 3
    everything = [argument for argument in places.source if argument not in ("--windows", "40")]
    assert _lowrank("evaluate", *everything, "--split", "all", "--json").body["windows"] > 128  # whole, not the default count


def test_context_defaults_to_what_the_model_takes(places: Places):
    short = ["--model", places.model, "--text", places.text, "--windows", 3]
    assert _lowrank("evaluate", *short, "--json").body["context"] == 64


def test_analyze_lists_every_layer(places: Places):
    module = "model.layers.1.mlp.up_proj"
    body = _lowrank("analyze", *places.source, "--json", "--directions", module, "--side", "output").body
    assert len(body["layers"]) == 14
    assert {"name", "break_even_rank", "weight_effective_rank", "feature_effective_rank"} <= set(body["layers"][0])
    assert (body["directions"]["module"], body["directions"]["side"]) == (module, "output")
    assert len(body["directions"]["directions"]) == 6
    assert body["model"]["compressible_parameters"] == sum(layer["d_out"] * layer["d_in"] for layer in body["layers"])


def test_methods_lists_every_registry():
    body = _lowrank("methods", "--json").body
    assert {row["basis"] for row in body["bases"]} == {f"`{name}`" for name in METRICS}
    assert {row["preset"] for row in body["presets"]} == {f"`{name}`" for name in PRESETS}
    assert "arXiv 2405.10616" in _lowrank("methods").out


def test_compress_gives_the_promised_keys_and_a_model(places: Places):
    body = _lowrank("compress", *places.source, "--compression-ratio", 0.3, "--out", places.out, "--json").body
    promised = {"compression_ratio", "model_compression_ratio", "parameters_before", "parameters_after", "ranks", "seconds"}
    assert promised <= set(body)
    assert 0.3 <= body["compression_ratio"] < 0.32
    assert body["model_compression_ratio"] == pytest.approx(1 - body["parameters_after"] / body["parameters_before"])
    members = {member for unit in body["ranks"] for member in unit.split("+")}
    assert members == {layer["name"] for layer in _lowrank("analyze", *places.source, "--json").body["layers"]}
    assert (body["preset"], body["allocation"], body["storage"]) == ("studio", "lagrangian", "pivoted")
    assert all(rank is None or rank >= 1 for rank in body["ranks"].values())
    measured = _lowrank("evaluate", *places.source[2:], "--model", places.out, "--against", places.model, "--json").body
    assert measured["parameters"] == body["parameters_after"]
    assert measured["compression_ratio"] == pytest.approx(body["compression_ratio"])
    assert measured["kl"] > 0


@pytest.mark.parametrize(("basis", "allocation"), [("pooled_feature", "lord_manual"), ("weight_svd", "uniform")])
def test_a_basis_and_an_allocation_can_be_chosen(places: Places, basis: str, allocation: str):
    options = ["--basis", basis, "--allocation", allocation, "--compression-ratio", "0.25", "--compress-value"]
    body = _lowrank("compress", *places.source, *options, "--out", places.out, "--json").body
    assert body["basis"] == basis
    assert body["allocation"] == allocation
    assert 0.25 <= body["compression_ratio"] < 0.27
    assert any(rank is not None for name, rank in body["ranks"].items() if name.endswith("v_proj"))


@pytest.mark.parametrize("preset", ["fwsvd", "asvd"])  # the one needs gradients, the other perplexities
def test_a_preset_is_a_whole_recipe(places: Places, preset: str):
    body = _lowrank("compress", *places.source, "--preset", preset, "--compression-ratio", 0.3, "--out", places.out, "--json").body
    expected = PRESETS[preset]
    assert (body["preset"], body["basis"], body["allocation"]) == (preset, expected.compression.basis, expected.allocation)
    assert 0.3 <= body["compression_ratio"] < 0.32


def test_what_is_given_beside_a_preset_wins(places: Places):
    options = ["--preset", "svd_llm", "--storage", "pivoted", "--no-compress-value", "--compression-ratio", 0.2]
    body = _lowrank("compress", *places.source, *options, "--out", places.out, "--json").body
    assert (body["basis"], body["storage"]) == ("whitened", "pivoted")
    assert all(rank is None for name, rank in body["ranks"].items() if name.endswith("v_proj"))


def test_damping_and_beta_can_be_given(places: Places):
    numbers = ["--input-damping", 1e-5, "--gradient-damping", 0.05, "--drift-beta", 0.5]
    options = ["--preset", "studio", *numbers, "--compression-ratio", 0.3]
    body = _lowrank("compress", *places.source, *options, "--out", places.out, "--json").body
    assert (body["gradient_damping"], body["drift_beta"]) == (0.05, 0.5)
    assert json.loads((places.out / "lowrank.json").read_text())["input_damping"] == 1e-5
    refused = _lowrank("compress", *places.source, *options, "--drift-beta", 2, "--out", places.folder / "other")
    assert refused.status == 2
    assert "between 0 and 1" in refused.err


def test_an_unknown_preset_lists_the_known_ones(places: Places):
    result = _lowrank("compress", *places.source, "--preset", "best", "--compression-ratio", 0.3, "--out", places.out)
    assert result.status == 2
    assert "studio, bolaco, svd" in result.err


def test_errors_in_different_units_are_traded_with_a_warning(places: Places):
    options = ["--basis", "whitened", "--allocation", "lagrangian", "--compression-ratio", 0.3]
    result = _lowrank("compress", *places.source, *options, "--out", places.out, "--json")
    assert any("in its own unit" in warning for warning in result.body["warnings"])
    assert "warning: lagrangian trades errors" in result.err


def test_robust_pooling_changes_what_is_measured_and_is_checked(places: Places):
    plain = _lowrank("analyze", *places.source, "--json").body
    robust = _lowrank("analyze", *places.source, "--robust", "downweighted", "--json").body
    key = "feature_effective_rank"
    assert [layer[key] for layer in plain["layers"]] != [layer[key] for layer in robust["layers"]]
    refused = _lowrank("analyze", *places.source, "--robust", "trimmed")
    assert refused.status == 2
    assert "at least 3" in refused.err


def test_a_search_says_that_its_kl_is_a_lower_bound_where_it_is(places: Places):
    options = ["--compression-ratio", 0.2, "--trials", 3, "--top-k", 8, "--confirmed", 0, "--run", places.folder / "run"]
    body = _lowrank("search", *places.source, *options, "--json").body
    assert body["protocol"].endswith("KL on the 8 likeliest tokens and the rest: a lower bound.")


def test_bolacos_search_runs_as_published(places: Places, tmp_path: Path, sample_text: str):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )
    model = save_checkpoint(tmp_path / "wide", LlamaForCausalLM(config), sample_text)
    options = ["--preset", "bolaco", "--compression-ratio", 0.2, "--trials", 5, "--confirmed", 0, "--run", tmp_path / "run"]
    body = _lowrank("search", "--model", model, *places.source[2:], *options, "--json").body
    assert body["objective"] == "bolaco"
    assert body["compression_ratio"] >= 0.2  # and, by ranks in eights, perhaps more than the tenth that the fractions may remove on top
    ranks = body["ranks"]
    assert all(rank is None for name, rank in ranks.items() if name.endswith("v_proj"))
    assert all(rank % 8 == 0 for rank in ranks.values() if rank is not None)
    run = open_run(tmp_path / "run")
    assert run.config.search is not None
    assert (run.config.search.startup_trials, run.config.search.projected) == (3, False)
    assert run.config.search.selected_windows == 100
    trials = read_trials(run)
    assert {(trial.state, trial.label) for trial in trials} == {("complete", "sampled")}
    assert [trials[0].params[name] for name in ("qk", "o", "gate", "up", "down")] == pytest.approx([0.5, 0.5, 0.8, 0.8, 0.8])
    assert all(
        0.7 - 1e-4 <= (1 + 2 * p["qk"] + p["o"] + 2.5 * (p["gate"] + p["up"] + p["down"])) / 11.5 <= 0.8 + 1e-4
        for p in (t.params for t in trials)
    )


def test_compress_takes_ranks_from_a_file(places: Places):
    ranks = places.file("ranks.json", json.dumps({QUERY: 5, "model.layers.1.mlp.down_proj": None}))
    body = _lowrank("compress", *places.source, "--ranks", ranks, "--out", places.out, "--json").body
    assert body["ranks"][QUERY] == 5
    assert [name for name, rank in body["ranks"].items() if rank is not None] == [QUERY]
    # 5 ranks in pivoted storage, 5 indices, and the bias that centring adds, instead of 32 x 32
    assert body["parameters_before"] - body["parameters_after"] == 32 * 32 - (5 * (64 - 5) + 5 + 32)


def test_search_gives_the_promised_keys(searched: tuple[Places, Path, dict[str, Any]]):
    places, run, body = searched
    assert {"value", "ranks", "compression_ratio", "export", "trials", "baselines"} <= set(body)
    assert body["trials"] == 4
    assert set(body["baselines"]) == {"uniform", "lord_manual", "lagrangian"}
    assert len(body["confirmed"]) == 3
    assert {row["protocol"].split(",")[1] for row in body["confirmed"]} == {" test split: 91 non-overlapping windows of 32 tokens"}
    assert all(body["value"] <= baseline["value"] for baseline in body["baselines"].values())
    assert body["gain"] == json.loads(json.dumps(search_gain(open_run(run)).to_mapping()))
    assert "best rule" in body["gain"]["words"]
    assert body["compression_ratio"] >= 0.2
    assert Path(body["export"]).is_relative_to(run)
    measured = _lowrank("evaluate", *places.source[2:], "--model", body["export"], "--against", places.model, "--json").body
    assert measured["compression_ratio"] == pytest.approx(body["compression_ratio"])


def test_search_is_finished_and_has_no_more_to_do(searched: tuple[Places, Path, dict[str, Any]]):
    _, run, _ = searched
    assert open_run(run).status().state == "finished"
    body = _lowrank("worker", "--run", run, "--json").body
    assert body["state"] == "finished"
    assert body["trials"] == 4


def test_worker_goes_on_with_a_search_that_was_stopped(searched: tuple[Places, Path, dict[str, Any]], tmp_path: Path):
    _, run, _ = searched
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    record = json.loads((copy / "run.json").read_text())
    record["config"]["search"]["trials"] = 6
    (copy / "run.json").write_text(json.dumps(record))
    (copy / "paused").touch()  # what the dashboard's stop leaves behind
    kept = _lowrank("worker", "--run", copy, "--keep-paused", "--json").body
    assert (kept["state"], kept["trials"]) == ("stopped", 4)
    resumed = _lowrank("worker", "--run", copy, "--json").body
    assert (resumed["state"], resumed["trials"]) == ("finished", 6)


def test_export_writes_a_chosen_trial(searched: tuple[Places, Path, dict[str, Any]], tmp_path: Path):
    places, run, best = searched
    body = _lowrank("export", "--run", run, "--out", tmp_path / "best", "--json").body
    assert body["ranks"] == best["ranks"]
    assert body["compression_ratio"] == pytest.approx(best["compression_ratio"])
    other = _lowrank("export", "--run", run, "--trial", 0, "--out", tmp_path / "first", "--json").body
    assert other["trial"] == 0
    assert _lowrank("evaluate", *places.source[2:], "--model", tmp_path / "first", "--json").body["windows"] == 40


def test_people_get_sentences(searched: tuple[Places, Path, dict[str, Any]]):
    places, run, _ = searched
    outcome = _lowrank("evaluate", *places.source)
    assert outcome.out.startswith("perplexity ")
    assert "40 non-overlapping windows of 32 tokens" in outcome.out
    assert "finished, 4 trials complete" in _lowrank("worker", "--run", run).out


def test_an_interrupted_search_says_how_to_go_on(places: Places, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank_core.worker.main.open_study", interrupted)
    outcome = _lowrank(*_search(places, "--compression-ratio", 0.2))
    assert outcome.status == 130
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1] == f"lowrank: interrupted. Go on with `lowrank worker --run {places.out}`."
    assert open_run(places.out).status().state == "stopped"
    monkeypatch.undo()
    monkeypatch.setenv("LOWRANK_HOME", str(places.folder / "home"))
    assert _lowrank("worker", "--run", places.out, "--json").body["trials"] == 3


def test_a_partial_choice_is_completed(places: Places):
    ranks = places.file("ranks.json", json.dumps({QUERY: 5, "model.layers.1.mlp.down_proj": None}))
    options = ["--ranks", ranks, "--complete", "lagrangian", "--compression-ratio", 0.4, "--out", places.out]
    body = _lowrank("compress", *places.source, *options, "--json").body
    assert body["ranks"][QUERY] == 5
    assert body["ranks"]["model.layers.1.mlp.down_proj"] is None
    assert 0.4 <= body["compression_ratio"] < 0.45
    assert len([rank for rank in body["ranks"].values() if rank is not None]) > 3


def test_a_search_over_ratios_prints_its_front(places: Places):
    options = ["--compression-ratio", 0.2, "--most-ratio", 0.5, "--trials", 5, "--confirmed", 1, "--run", places.out]
    outcome = _lowrank("search", *places.source, *options)
    assert outcome.out.startswith("Pareto front, on validation text:")
    assert f"lowrank export --run {places.out} --trial N" in outcome.out
    refused = _lowrank("export", "--run", places.out, "--out", places.folder / "best")
    assert refused.status == 2
    assert "no single best trial" in refused.err


def test_a_hand_picked_allocation_waits_for_its_worker(searched: tuple[Places, Path, dict[str, Any]], tmp_path: Path):
    _, run, best = searched
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({"ranks": best["ranks"]}))
    said = _lowrank("enqueue", "--run", copy, "--ranks", ranks).out
    assert f"`lowrank worker --run {copy}` will measure it" in said
    _lowrank("worker", "--run", copy, "--json")
    mine = read_trials(open_run(copy))[-1]
    assert (mine.label, mine.state, mine.kl) == ("manual", "complete", pytest.approx(best["kl"]))


@pytest.mark.parametrize(("rank", "words"), [(99999, "rank"), (None, "model.layers.99.up_proj")])
def test_a_hand_picked_allocation_that_does_not_fit_is_refused_at_once(
    searched: tuple[Places, Path, dict[str, Any]], tmp_path: Path, rank: int | None, words: str
):
    _, run, best = searched
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({next(iter(best["ranks"])) if rank else words: rank or 3}))
    before = len(list((run / "requests").glob("*"))) if (run / "requests").exists() else 0
    refused = _lowrank("enqueue", "--run", run, "--ranks", ranks)
    assert refused.status == 2
    assert words in refused.err
    assert refused.err.count("\n") == 1
    assert before == (len(list((run / "requests").glob("*"))) if (run / "requests").exists() else 0)


def test_a_search_is_extended_with_another_sampler(searched: tuple[Places, Path, dict[str, Any]], tmp_path: Path):
    _, run, _ = searched
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    body = _lowrank("worker", "--run", copy, "--more-trials", 2, "--sampler", "tpe", "--json").body
    assert (body["state"], body["trials"]) == ("finished", 6)
    assert open_run(copy).config.search.sampler == "tpe"  # type: ignore[union-attr]


def test_a_search_is_not_extended_by_nothing(searched: tuple[Places, Path, dict[str, Any]]):
    outcome = _lowrank("worker", "--run", searched[1], "--more-trials", 0)
    assert outcome.status == 2
    assert "--more-trials must be at least 1" in outcome.err


# --- bad input -------------------------------------------------------------------------------------------------------


def _compress(places: Places, *options: object) -> list[object]:
    return ["compress", *places.source, "--out", places.out, *options]


def _search(places: Places, *options: object) -> list[object]:
    return ["search", *places.source, "--trials", 3, "--run", places.out, *options]


def _with_model(command: Callable[..., list[object]], model: Callable[[Places], object]) -> Callable[[Places], list[object]]:
    def arguments(places: Places) -> list[object]:
        return [*command(places, "--compression-ratio", 0.2), "--model", model(places)]

    return arguments


def _evaluate(places: Places, *_: object) -> list[object]:
    return ["evaluate", *places.source]


def _bert(places: Places) -> Path:
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return save_checkpoint(places.folder / "bert", BertForMaskedLM(config), "some words of text")


def _corrupt(places: Places) -> Path:
    folder = Path(shutil.copytree(places.model, places.folder / "corrupt"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


MODELS: dict[str, tuple[Callable[[Places], object], str]] = {
    "missing folder": (lambda places: places.folder / "nowhere", "there is no folder"),
    "not a causal LM": (_bert, "not a causal language model"),
    "corrupt safetensors": (_corrupt, "model.safetensors is damaged or cut short"),
    "unknown hub id offline": (lambda _: "nobody/nothing", "neither a local folder nor a hub id"),
    "an empty name": (lambda _: "", "give `demo`, a local folder, a GGUF file, or a hub id"),
}

RATIOS = {"0": "0 would remove nothing", "1": "got 1. Try 0.2", "1.5": "got 1.5. Try 0.2", "-0.1": "got -0.1", "nan": "got nan"}


def _ranks(content: object) -> Callable[[Places], list[object]]:
    return lambda places: _compress(places, "--ranks", places.file("ranks.json", json.dumps(content)))


BAD_INPUT: dict[str, tuple[Callable[[Places], list[object]], str]] = {
    **{
        f"{command.__name__[1:]}: {name}": (_with_model(command, model), message)
        for name, (model, message) in MODELS.items()
        for command in (_evaluate, _compress, _search)
    },
    **{
        f"{command.__name__[1:]}: ratio {ratio}": (
            lambda places, command=command, ratio=ratio: command(places, f"--compression-ratio={ratio}"),  # type: ignore[misc]
            message,
        )
        for ratio, message in RATIOS.items()
        for command in (_compress, _search)
    },
    "a ratio that can't be met": (lambda p: _compress(p, "--compression-ratio", 0.95), "0.95 can't be met"),
    "search: a ratio that can't be met": (lambda p: _search(p, "--compression-ratio", 0.95), "0.95 can't be met"),
    "a ratio that is no number": (lambda p: _compress(p, "--compression-ratio", "much"), "invalid float value: 'much'"),
    "neither ratio nor ranks": (_compress, "give --compression-ratio, or --ranks FILE"),
    "empty text": (lambda p: [*_evaluate(p), "--text", f"file:{p.file('empty.txt', '')}"], "is empty"),
    "search: empty text": (
        lambda p: [*_search(p, "--compression-ratio", 0.2), "--text", f"file:{p.file('empty.txt', '')}"],
        "is empty",
    ),
    "text too short": (lambda p: [*_evaluate(p), "--text", f"file:{p.file('short.txt', 'a word')}"], "fewer than one window"),
    "missing text": (lambda p: [*_evaluate(p), "--text", f"file:{p.folder / 'none.txt'}"], "there is no file"),
    "unknown text": (lambda p: [*_evaluate(p), "--text", "gutenberg"], "is none of python-stdlib"),
    "rank above the limit": (_ranks({QUERY: 33}), r"q_proj: rank must be in \[1, 32\], got 33"),
    "rank of zero": (_ranks({QUERY: 0}), r"the rank 0\. Write at least 1"),
    "rank that is no number": (_ranks({QUERY: "many"}), 'the rank "many"\\. Write a whole number'),
    "ranks of an unknown layer": (_ranks({"brain": 3}), "'brain' is no compressible layer"),
    "ranks in a list": (_ranks([3]), "must hold a JSON object"),
    "ranks that are no JSON": (lambda p: _compress(p, "--ranks", p.file("r.json", "{")), r"r\.json"),
    "missing ranks": (lambda p: _compress(p, "--ranks", p.folder / "none.json"), "none.json"),
    "ranks that remove too little": (
        lambda p: [*_ranks({QUERY: 5})(p), "--compression-ratio", 0.5],
        "less than the ratio 0.5 asked for",
    ),
    "unknown basis": (lambda p: _compress(p, "--compression-ratio", 0.2, "--basis", "x"), "basis must be one of pooled_feature"),
    "search: unknown basis": (lambda p: _search(p, "--compression-ratio", 0.2, "--basis", "x"), "basis must be one of"),
    "unknown allocation": (lambda p: _compress(p, "--compression-ratio", 0.2, "--allocation", "x"), "allocation must be one of uniform"),
    "unknown storage": (lambda p: _compress(p, "--compression-ratio", 0.2, "--storage", "x"), "storage must be one of factored"),
    "unknown space": (lambda p: _search(p, "--compression-ratio", 0.2, "--space", "9x9"), "space must be one of 5x1"),
    "unknown sampler": (lambda p: _search(p, "--compression-ratio", 0.2, "--sampler", "x"), "sampler must be one of gp"),
    "unknown objective": (lambda p: _search(p, "--compression-ratio", 0.2, "--objective", "x"), "objective must be one of kl"),
    "compress: nothing to complete": (
        lambda p: _compress(p, "--compression-ratio", 0.2, "--complete", "lagrangian"),
        "--complete completes a file of ranks",
    ),
    "search: nothing to complete": (lambda p: _search(p, "--compression-ratio", 0.2, "--complete", "uniform"), "give one with --ranks"),
    "search: no workers": (lambda p: _search(p, "--compression-ratio", 0.2, "--workers", 0), "--workers must be at least 1"),
    "search: a range backwards": (lambda p: _search(p, "--compression-ratio", 0.4, "--most-ratio", 0.3), "must lie above"),
    "search: two objectives for CMA-ES": (
        lambda p: _search(p, "--compression-ratio", 0.2, "--most-ratio", 0.3, "--sampler", "cmaes"),
        "CMA-ES has one objective",
    ),
    "search: two objectives stopped early": (
        lambda p: _search(p, "--compression-ratio", 0.2, "--most-ratio", 0.3, "--pruner", "wilcoxon"),
        "leave the pruner out",
    ),
    "search: more groups than blocks": (lambda p: _search(p, "--compression-ratio", 0.2, "--space", "5x4"), "the model has 2 blocks"),
    "search: stacks by kept fractions": (
        lambda p: _search(p, "--compression-ratio", 0.2, "--preset", "studio", "--variables", "keep_ratio"),
        "choose variables `error_weight`",
    ),
    "search: top-k for the paper's objective": (
        lambda p: _search(p, "--compression-ratio", 0.2, "--objective", "bolaco", "--top-k", 8),
        "leave top-k at 0",
    ),
    "search: a database that is not there": (
        lambda p: _search(p, "--compression-ratio", 0.2, "--storage-url", "postgresql+psycopg://u:pw@127.0.0.1:9/x"),
        r"u:\*\*\*@127.0.0.1:9/x",
    ),
    "worker: nothing said": (lambda p: ["worker"], "either --run DIR, or --storage-url"),
    "worker: joins and changes": (lambda p: ["worker", "--run", p.out, "--join", "--more-trials", 3], "Leave them out"),
    "worker: half a study": (lambda p: ["worker", "--study", "x"], "give --storage-url and --study together"),
    "no trials": (lambda p: [*_search(p, "--compression-ratio", 0.2), "--trials", 0], "trials must be at least 1"),
    "windows of zero": (lambda p: [*_evaluate(p), "--windows", 0], "windows must be at least 1"),
    "context beyond the model": (lambda p: [*_evaluate(p), "--context", 65], "takes 64. Lower --context"),
    "compress: context beyond the model": (
        lambda p: [*_compress(p, "--compression-ratio", 0.2), "--context", 65],
        "takes 64. Lower --context",
    ),
    "a negative seed": (lambda p: [*_evaluate(p), "--seed", -1], "seed must be at least 0"),
    "an unknown device": (lambda p: [*_evaluate(p), "--device", "abacus"], "is no device"),
    "an unknown dtype": (lambda p: [*_evaluate(p), "--dtype", "int8"], "dtype must be one of"),
    "an unknown split": (
        lambda p: [*_evaluate(p), "--split", "train"],
        "split must be one of calibration, validation, test, all; got 'train'",
    ),
    "a run that is none": (lambda p: ["worker", "--run", p.folder / "nowhere"], "is no run"),
    "an export of no run": (lambda p: ["export", "--run", p.folder / "nowhere", "--out", p.out], "is no run"),
    "no command": (lambda p: [], "required: COMMAND"),
    "an unknown command": (lambda p: ["shrink"], "invalid choice: 'shrink'"),
    "out is a file": (lambda p: [*_compress(p, "--compression-ratio", 0.2), "--out", p.file("taken", "mine")], "is a file"),
    "out below a file": (
        lambda p: [*_compress(p, "--compression-ratio", 0.2), "--out", p.file("taken", "mine") / "out"],
        "is no folder that you can write to",
    ),
}


def _tree(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*"))


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_line_and_leaves_nothing(case: str, places: Places, lowrank_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make, message = BAD_INPUT[case]
    arguments = make(places)
    before = _tree(places.folder)
    outcome = _lowrank(*arguments)
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("lowrank")
    assert re.search(message, outcome.err), outcome.err
    assert _tree(places.folder) == before
    assert not (lowrank_home / "runs").exists()


@pytest.mark.parametrize("command", [_compress, _search])
def test_a_folder_that_is_not_empty_is_left_as_it_is(command: Callable[..., list[object]], places: Places):
    places.out.mkdir()
    (places.out / "mine.txt").write_text("mine")
    outcome = _lowrank(*command(places, "--compression-ratio", 0.2))
    assert outcome.status == 2
    assert "is not empty" in outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in places.out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trial", "99"], "trial 99 of this run is not complete; it has 4 complete trials"),
        (["--trial", "worst"], "--trial must be `best` or a number, got 'worst'"),
        (["--out", "{run}"], "is not empty"),
    ],
)
def test_exports_that_can_not_be_are_told(options: list[str], message: str, searched: tuple[Places, Path, dict[str, Any]], tmp_path: Path):
    _, run, _ = searched
    outcome = _lowrank("export", "--run", run, "--out", tmp_path / "out", *(option.format(run=run) for option in options))
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert _tree(tmp_path) == []


def test_a_second_search_in_the_same_folder_is_refused(searched: tuple[Places, Path, dict[str, Any]]):
    places, run, _ = searched
    before = _tree(run)
    outcome = _lowrank("search", *places.source, "--compression-ratio", 0.2, "--run", run)
    assert outcome.status == 2
    assert f"resume the run in it with `lowrank worker --run {run}`" in outcome.err
    assert _tree(run) == before


def test_models_of_different_vocabularies_are_not_compared(places: Places, tmp_path: Path, sample_text: str):
    config = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    save_checkpoint(tmp_path / "other", LlamaForCausalLM(config), sample_text)
    outcome = _lowrank("evaluate", *places.source, "--against", tmp_path / "other")
    assert outcome.status == 2
    assert "different vocabularies" in outcome.err


# --- as a process ----------------------------------------------------------------------------------------------------


def _process(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lowrank_core", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)


@pytest.mark.process
def test_a_process_prints_json_alone(places: Places):
    done = _process("compress", *places.source, "--compression-ratio", 0.3, "--out", places.out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(places.out)
    assert done.stdout.count("\n") == 1


@pytest.mark.process
def test_a_process_says_what_is_wrong_in_one_line(places: Places):
    done = _process("search", "--model", "nobody/nothing", "--text", places.text, "--compression-ratio", 0.2, "--run", places.out)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert _tree(places.folder) == []

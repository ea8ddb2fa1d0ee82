"""What a worker measures when it is asked: every kind of model, a second text, single tokens, time; and what is withdrawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation import evaluate
from lowrank_core.evaluation.texts import losses_of, pieces_of, tokens_of_text
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.runs import Run, client, create_run, read_json
from lowrank_core.speed import MemoryReport, SpeedConfig
from lowrank_core.text import load_windows
from lowrank_core.worker.context import LastBuilt
from lowrank_core.worker.main import run_worker
from lowrank_core.worker.reporter import Reporter

Answer = Mapping[str, object]


@pytest.fixture
def run(llama_checkpoint: Path, text_file: Path) -> Run:
    """A search of one trial that nobody worked on yet."""
    return create_run(
        RunConfig(
            model=ModelSource(str(llama_checkpoint)),
            text=TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6),
            calibration=CalibrationConfig(group_size=8),
            search=SearchConfig(compression_ratio=0.3, trials=1, confirmed=0),
        )
    )


def results_of(run: Run, *asked: tuple[str, Mapping[str, object]]) -> list[Answer]:
    """Ask for all of it, and let a worker in this process answer."""
    requests = [client.submit(run, kind, launch=False, **arguments) for kind, arguments in asked]  # type: ignore[arg-type]
    run_worker(run, verbose=False)
    result = [read_json(client.result_path(run, request)) for request in requests]
    assert None not in result
    return result  # type: ignore[return-value]


def report_of(answer: Answer) -> Mapping[str, object]:
    assert answer["ok"], answer
    report = answer["report"]
    assert isinstance(report, Mapping)
    return report


def numbers(values: object) -> list[float]:
    assert isinstance(values, Sequence)
    return list(values)


PUBLISHED = ("bolaco", "fwsvd", "pifa", "welore", "basis_sharing", "aa_svd", "asvd", "mpifa")
"""Presets with gradients, pivots, a threshold, shared bases, sequential fits and a search for ranks among them."""


def test_presets_are_measured_by_their_own_recipe_at_the_runs_ratio(run: Run):
    assert set(PUBLISHED) <= set(PRESETS)
    results = results_of(run, *(("compare", {"trial": f"preset:{name}"}) for name in PUBLISHED))
    assert [answer["error"] for answer in results if not answer["ok"]] == []
    for answer in results:
        report = report_of(answer)
        assert answer["label"] == answer["trial"]
        assert float(str(report["compression_ratio"])) >= 0.3
        assert 0 < float(str(report["flops"])) <= float(str(report["dense_flops"]))
    assert len({report_of(answer)["kl"] for answer in results}) > len(results) // 2  # not one model for all


def test_a_preset_that_can_not_meet_the_ratio_gives_the_reason(run: Run):
    search = SearchConfig(compression_ratio=0.91, trials=1, confirmed=0, compression=CompressionConfig(value_dense=False))
    tight = create_run(replace(run.config, search=search))
    refused, unknown = results_of(tight, ("compare", {"trial": "preset:bolaco"}), ("compare", {"trial": "preset:magic"}))
    assert refused["ok"] is unknown["ok"] is False
    assert "can't be met" in str(refused["error"])
    assert "preset must be one of" in str(unknown["error"])


def test_an_answer_says_what_figures_by_window_and_position_need(run: Run):
    (answer,) = results_of(run, ("compare", {"trial": "uniform"}))
    report = report_of(answer)
    ours, theirs = numbers(report["window_nll"]), numbers(report["dense_window_nll"])
    assert len(ours) == len(theirs) == 6
    assert sum(ours) / 6 == pytest.approx(float(str(report["nll"])), abs=1e-6)
    rows = report["by_position"]
    assert isinstance(rows, list)
    assert [row["first"] for row in rows] == [1, 2, 4, 8, 16]
    low, high = numbers(report["perplexity_ratio_interval"])
    assert low <= float(str(report["perplexity"])) / float(str(report["dense_perplexity"])) <= high
    path = next((run.path / "results").glob("*.json"))
    assert path.stat().st_size < 8000


def test_a_second_text_is_measured_beside_the_original_on_the_same_windows(run: Run, tmp_path: Path, sample_text: str):
    other = tmp_path / "other.txt"
    other.write_text(sample_text[::-1], encoding="utf-8")
    own, second, missing, unnamed = results_of(
        run,
        ("compare", {"trial": "uniform"}),
        ("other_text", {"trial": "uniform", "text": f"file:{other}"}),
        ("other_text", {"trial": "uniform", "text": "file:/no/such.txt"}),
        ("other_text", {"trial": "uniform"}),
    )
    report = report_of(second)
    assert second["text"] == f"file:{other}"
    assert report["dataset"] == "file:other.txt"
    assert report["split"] == "test"
    assert report["windows"] == 6
    dense = load_model(run.config.model)
    windows = load_windows(replace(run.config.text, reference=f"file:{other}"), dense.tokenizer, "test", count=6)
    assert report["dense_perplexity"] == pytest.approx(evaluate(dense, windows).perplexity)
    assert report["dense_perplexity"] != report_of(own)["dense_perplexity"]
    assert "there is no file" in str(missing["error"])
    assert "no second text is given" in str(unnamed["error"])


def test_tokens_are_those_of_the_comparison_and_join_to_the_text(run: Run):
    words = "the rank of a matrix tells <b>how many</b> directions"
    own, window, given, far, empty = results_of(
        run,
        ("compare", {"trial": "uniform"}),
        ("tokens", {"trial": "uniform", "window": 2}),
        ("tokens", {"trial": "uniform", "text": words}),
        ("tokens", {"trial": "uniform", "window": 6}),
        ("tokens", {"trial": "uniform", "text": ""}),
    )
    report = report_of(own)
    assert window["ok"], window
    for name, means in (("nll", report["window_nll"]), ("dense_nll", report["dense_window_nll"])):
        losses = numbers(window[name])
        assert len(losses) == 31
        assert sum(losses) / 31 == pytest.approx(numbers(means)[2], abs=1e-4)
    assert given["ok"], given
    pieces = given["pieces"]
    assert isinstance(pieces, list)
    assert "".join(pieces) == words
    assert len(numbers(given["nll"])) == len(pieces) - 1 == len(numbers(given["kl"]))
    assert "window must be a number from 0 to 5" in str(far["error"])
    assert "fewer than two tokens" in str(empty["error"])


def test_speed_is_timed_in_turns_with_memory_and_leaves_nothing_behind(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fresh_process(source: ModelSource, config: SpeedConfig, *, fingerprint: str = "") -> MemoryReport:
        return MemoryReport(load_model(source).bytes, config.prompt_tokens, "pretended")

    monkeypatch.setattr("lowrank_core.speed.comparison.measure_memory", fresh_process)  # a process that imports torch takes long
    settings = {"prompt_tokens": 8, "new_tokens": 3, "rounds": 2}
    with_memory, without, too_long = results_of(
        run,
        ("speed", {"trial": "uniform", **settings}),
        ("speed", {"trial": "uniform", "memory": False, **settings}),
        ("speed", {"trial": "uniform", "prompt_tokens": 1000}),
    )
    assert with_memory["ok"], with_memory
    for answer in (with_memory, without):
        assert answer["prefill_speedup"]["low"] <= answer["prefill_speedup"]["median"] <= answer["prefill_speedup"]["high"]  # type: ignore[index]
        assert "median of 2 rounds" in answer["compressed"]["protocol"]  # type: ignore[index]
        assert answer["compressed"]["parameters"] < answer["dense"]["parameters"]  # type: ignore[index]
        assert answer["flops"] < answer["dense_flops"]  # type: ignore[operator]
    loaded = [with_memory[name]["memory"]["loading"] for name in ("compressed", "dense")]  # type: ignore[index]
    assert loaded[0] < loaded[1]
    assert without["compressed"]["memory"] is None  # type: ignore[index]
    assert "pass the 64 positions" in str(too_long["error"])
    assert not list(run.path.glob("speed-*"))


def test_a_healed_model_is_measured_like_any_other(run: Run):
    settings = {"method": "diagonal", "steps": 2, "batch_size": 4, "validate_every": 1}
    (healing,) = results_of(run, ("heal", {"trial": "uniform", "healing": settings}))
    assert healing["ok"], healing
    name = str(healing["folder"])
    again, said, lost = results_of(
        run,
        ("compare", {"trial": f"healed:{name}"}),
        ("generate", {"trial": f"healed:{name}", "prompt": "the rank", "tokens": 3}),
        ("compare", {"trial": "healed:../../elsewhere"}),
    )
    assert again["label"] == healing["label"] == said["label"]
    assert report_of(again)["perplexity"] == pytest.approx(healing["report"]["perplexity"], rel=1e-4)  # type: ignore[index]
    assert "this run has no healed model" in str(lost["error"])


def test_a_healing_takes_the_one_shot_figures_that_the_session_has_measured(run: Run):
    def measured() -> int:
        lines = (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line).get("name") == "Measuring Uniform on test text" for line in lines)

    first, second = ({"trial": "uniform", "healing": {"method": "diagonal", "steps": steps, "validate_every": 1}} for steps in (1, 2))
    other, compared, healing = results_of(run, ("compare", {"trial": "preset:bolaco"}), ("compare", {"trial": "uniform"}), ("heal", first))
    assert healing["one_shot"]["kl"] == report_of(compared)["kl"] != report_of(other)["kl"]  # type: ignore[index]
    assert measured() == 1
    (again,) = results_of(run, ("heal", second))  # a worker that knows only what it measured itself
    assert measured() == 2
    assert again["one_shot"]["kl"] == pytest.approx(report_of(compared)["kl"])  # type: ignore[index]


def test_a_request_that_is_withdrawn_while_it_waits_is_never_begun(run: Run):
    first = client.submit(run, "compare", launch=False, trial="uniform")
    gone = client.submit(run, "compare", launch=False, trial="lord_manual")
    client.cancel(run, gone)
    run_worker(run, verbose=False)
    assert read_json(client.result_path(run, first)) is not None
    assert read_json(client.result_path(run, gone)) is None
    assert not client.pending_requests(run)


def test_the_request_in_hand_ends_when_it_is_withdrawn_and_the_next_is_answered(run: Run, monkeypatch: pytest.MonkeyPatch):
    asked = [client.submit(run, "compare", launch=False, trial=trial) for trial in ("uniform", "lord_manual")]
    stage = Reporter.stage

    def withdraw_first(self: Reporter, name: str, total: int = 0) -> object:
        if name == "Measuring Uniform on test text":
            client.cancel(run, asked[0])
        return stage(self, name, total)

    monkeypatch.setattr(Reporter, "stage", withdraw_first)
    run_worker(run, verbose=False)
    assert read_json(client.result_path(run, asked[0])) is None
    second = read_json(client.result_path(run, asked[1]))
    assert second is not None
    assert second["ok"]
    assert run.status().state == "finished"  # nothing was stopped


def test_requests_in_a_row_share_one_model():
    last_built, built = LastBuilt(), []

    def build(name: str) -> Callable[[], object]:
        return lambda: built.append(name) or name  # type: ignore[func-returns-value]

    assert [last_built.take(key, build(key)) for key in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert built == ["a", "b", "a"]
    last_built.clear()
    last_built.take("a", build("a"))
    assert built == ["a", "b", "a", "a"]


# --- one text, token by token ----------------------------------------------------------------------------------------


def test_the_same_model_twice_costs_no_token_anything(llama: ModelHandle):
    ids, left_out = tokens_of_text(llama, "the rank of a matrix", bos=True, maximum=64)
    result = losses_of(llama, llama, ids)
    assert left_out == 0
    assert result.nll == result.dense_nll
    assert max(map(abs, result.kl)) < 1e-4
    assert result.likeliest == result.dense_likeliest
    with torch.no_grad():
        logits = llama.module(input_ids=ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    assert result.nll == pytest.approx(expected.tolist(), abs=1e-3)
    assert all(math.isfinite(value) for value in result.nll)


def test_pieces_join_to_the_text_also_inside_characters(llama: ModelHandle):
    text = "naïve café → 日本 🙂 end"
    ids = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(llama.tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == llama.tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in llama.tokenizer.decode(ids)


def test_a_long_text_is_cut_and_says_by_how_much(llama: ModelHandle):
    ids, left_out = tokens_of_text(llama, "rank " * 50, bos=False, maximum=10)
    assert len(ids) == 10
    assert left_out > 0
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        tokens_of_text(llama, "", bos=True, maximum=10)

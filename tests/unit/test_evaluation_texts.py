"""Several texts, and continuations next to each other: what the command line gives."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.commands import evaluate
from lowrank_core.commands.evaluate import continue_with, evaluate_on, evaluate_on_texts
from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.config.evaluation import EvaluationConfig, Sampling
from lowrank_core.errors import ConfigError, TextError
from lowrank_core.evaluation.generation import continue_prompt
from lowrank_core.models import ModelHandle


def _lowrank(*arguments: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return out.getvalue()


@pytest.fixture
def texts(text_file: Path, tmp_path: Path) -> list[str]:
    """A text, and the same words in another order."""
    other = tmp_path / "other.txt"
    lines = text_file.read_text(encoding="utf-8").splitlines()
    other.write_text("\n".join(" ".join(reversed(line.split())) for line in lines), encoding="utf-8")
    return [f"file:{text_file}", f"file:{other}"]


@pytest.fixture
def options(llama_checkpoint: Path) -> list[object]:
    return ["--model", llama_checkpoint, "--context", 32, "--windows", 20]


def _without_time(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "seconds"}


def test_several_texts_are_as_each_alone(options: list[object], texts: list[str], llama_checkpoint: Path) -> None:
    options = ["evaluate", *options, "--against", llama_checkpoint, "--stride", 8, "--json"]
    body = json.loads(_lowrank(*options, "--text", *texts))
    assert set(body) == {"model", "texts"}
    alone = [json.loads(_lowrank(*options, "--text", text)) for text in texts]
    assert [_without_time(result) for result in body["texts"]] == [_without_time(result) for result in alone]
    assert [result["dataset"] for result in alone] == ["file:sample.txt", "file:other.txt"]
    assert alone[0]["perplexity"] != alone[1]["perplexity"]
    assert alone[0]["stride"] == 8


def test_one_text_has_the_keys_that_it_always_had(options: list[object], texts: list[str], llama_checkpoint: Path) -> None:
    body = json.loads(_lowrank("evaluate", *options, "--against", llama_checkpoint, "--text", texts[0], "--json"))
    assert {"dataset", "split", "context", "windows", "tokens", "bos", "protocol", "perplexity", "nll", "nll_stderr", "seconds"} <= set(
        body
    )
    assert {"perplexity_interval", "window_nll", "dense_perplexity", "kl", "kl_interval", "top1_agreement", "model"} <= set(body)
    assert {"reverse_kl", "reverse_kl_interval", "top5_agreement", "by_position"} <= set(body)
    assert "stride" not in body
    assert "texts" not in body


def test_people_read_the_protocol_beside_every_number(options: list[object], texts: list[str], llama_checkpoint: Path) -> None:
    one = _lowrank("evaluate", *options, "--against", llama_checkpoint, "--text", texts[0])
    assert one.startswith("perplexity ")
    for word in (
        "difference",
        "paired",
        "KL",
        "reverse KL",
        "top-1 agreement 100.0%",
        "top-5 100.0%",
        "20 non-overlapping windows",
        "16 to 31",
    ):
        assert word in one
    several = _lowrank("evaluate", *options, "--against", llama_checkpoint, "--text", *texts)
    for name in ("sample", "other"):
        assert several.count(f"file:{name}.txt, test split: 20 non-overlapping windows of 32 tokens") == 1
    assert "nan" not in (one + several).lower()
    assert "reverse" not in _lowrank("evaluate", *options, "--text", *texts)


def test_models_are_loaded_once_for_all_texts(texts: list[str], llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda source: loaded.append(source) or load(source))
    source = ModelSource(str(llama_checkpoint))
    evaluate_on_texts(source, [TextConfig(text, context=32) for text in texts], EvaluationConfig(windows=4), source.reference)
    assert len(loaded) == 2


def test_a_text_that_is_not_there_is_told_before_anything_is_loaded(
    texts: list[str], llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda source: pytest.fail("loaded"))
    chosen = [TextConfig(text, context=32) for text in (texts[0], "gutenberg")]
    with pytest.raises(TextError, match="'gutenberg' is none of python-stdlib"):
        evaluate_on_texts(ModelSource(str(llama_checkpoint)), chosen, EvaluationConfig())


def test_a_text_too_short_is_told_before_anything_is_measured(
    texts: list[str], llama_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("a word", encoding="utf-8")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("measured"))
    chosen = [TextConfig(text, context=32) for text in (texts[0], f"file:{tmp_path / 'short.txt'}")]
    with pytest.raises(TextError, match=r"file:short\.txt has .* fewer than one window of 32"):
        evaluate_on_texts(ModelSource(str(llama_checkpoint)), chosen, EvaluationConfig())


def test_requests_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="split must be one of calibration, validation, test, all; got 'train'"):
        EvaluationConfig("train")
    with pytest.raises(ConfigError, match="windows must be at least 1, got 0"):
        EvaluationConfig(windows=0)


def test_a_stride_out_of_range_is_one_line(options: list[object], texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(argument) for argument in ["evaluate", *options, "--text", texts[0], "--stride", 32]]) == 2
    error = capsys.readouterr().err
    assert "stride must be at least 1 and at most 31" in error
    assert error.count("\n") == 1


def test_all_windows_of_a_whole_text_are_taken(texts: list[str], llama_checkpoint: Path) -> None:
    body = evaluate_on(ModelSource(str(llama_checkpoint)), TextConfig(texts[0], context=32, test_windows=3), EvaluationConfig("all"))
    assert int(str(body["windows"])) > 128


# --- continuations ---------------------------------------------------------------------------------------------------


def test_both_models_continue_and_are_named(llama: ModelHandle, llama_checkpoint: Path, gpt2_checkpoint: Path) -> None:
    options = ["generate", "--model", gpt2_checkpoint, "--against", llama_checkpoint, "--prompt", "the rank", "--tokens", 8]
    body = json.loads(_lowrank(*options, "--json"))
    assert (body["prompt"], body["tokens"], body["temperature"], body["seed"]) == ("the rank", 8, 0.0, 0)
    assert [result["model"] for result in body["continuations"]] == [str(llama_checkpoint), str(gpt2_checkpoint)]
    assert body["continuations"][0]["text"] == continue_prompt(llama, "the rank", tokens=8)
    lines = _lowrank(*options).splitlines()
    assert lines[0] == "prompt: the rank"
    assert all(" | " in line for line in lines[2:] if line.strip() and not line.startswith(" " * 58))
    left, right = ("".join(line.ljust(61)[half].strip() for line in lines[2:]) for half in (slice(0, 58), slice(61, None)))
    assert str(llama_checkpoint) in left
    assert str(gpt2_checkpoint) in right


def test_a_model_alone_prints_the_prompt_and_goes_on(llama: ModelHandle, llama_checkpoint: Path) -> None:
    printed = _lowrank("generate", "--model", llama_checkpoint, "--prompt", "the rank", "--tokens", 8)
    name, facts, text = printed.split("\n", 2)
    assert name == str(llama_checkpoint)
    assert re.fullmatch(r"\d tokens, (repeated 4-grams [\d.]+%, )?(ended by itself|cut at the limit)", facts)
    assert text.rstrip("\n") == f"\nthe rank{continue_prompt(llama, 'the rank', tokens=8)}".rstrip("\n")


def test_a_seed_draws_the_same_for_both(llama_checkpoint: Path) -> None:
    source = ModelSource(str(llama_checkpoint))
    bodies = [continue_with(source, "the rank", Sampling(8, 1.0, seed), against=source.reference) for seed in range(4)]
    pairs = [[result["text"] for result in body["continuations"]] for body in bodies]  # type: ignore[attr-defined]
    assert all(first == second for first, second in pairs)
    assert len({first for first, _ in pairs}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_checkpoint_s_own_rule_is_not_followed(llama: ModelHandle, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export without ``generation_config.json`` would else be sampled by another rule than the model that it was made from."""
    expected = continue_prompt(llama, "the rank", tokens=12, seed=1, temperature=temperature)
    for name, value in {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "top_k": 1, "top_p": 0.1, "temperature": 0.01}.items():
        monkeypatch.setattr(llama.module.generation_config, name, value)
    assert continue_prompt(llama, "the rank", tokens=12, seed=1, temperature=temperature) == expected


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, r"temperature must be a number from 0 .* got -0\.5"),
        ({"temperature": float("nan")}, "temperature must be a number from 0"),
        ({"temperature": float("inf")}, "temperature must be a number from 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_settings_out_of_range_are_refused(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**sampling)


def test_continuing_leaves_the_random_state_alone(llama: ModelHandle) -> None:
    before = torch.get_rng_state()
    continue_prompt(llama, "the rank", tokens=4, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())

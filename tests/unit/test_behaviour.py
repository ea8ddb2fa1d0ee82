"""Repetition, endings and length of continuations: what is counted, and that it is what the model writes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, SearchConfig, TextConfig
from lowrank_core.config.evaluation import BehaviourConfig
from lowrank_core.errors import ConfigError
from lowrank_core.evaluation.behaviour import measure_behaviour
from lowrank_core.models import ModelHandle
from lowrank_core.runs import Run, client, create_run
from lowrank_core.runs.measurements import Behaviour, BehaviourComparison, ContinuationFacts
from lowrank_core.studies.requests import BehaviourAnswer, answers_of
from lowrank_core.studio.compare.behaviour import behaviours
from lowrank_core.studio.report import report_html
from lowrank_core.text import WindowSet
from lowrank_core.worker.handlers import metrics_of_trial
from lowrank_core.worker.healing import behaviour_of
from lowrank_core.worker.main import run_worker

CONFIG = BehaviourConfig(prompts=11, prompt_tokens=6, new_tokens=24)


# what is counted


@pytest.mark.parametrize(
    ("tokens", "repeated"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 and 1234 again
        ([7] * 10, 6 / 7),  # the first of seven is new
        ([1, 2, 3], None),
        ([], None),
    ],
)
def test_four_grams_that_occurred_before_are_counted(tokens: list[int], repeated: float | None):
    facts = ContinuationFacts.of(tokens, ())
    assert facts.repeated == (None if repeated is None else pytest.approx(repeated))
    assert (facts.tokens, facts.ended) == (len(tokens), None)


def test_the_end_token_and_what_follows_it_do_not_count():
    assert ContinuationFacts.of([1, 2, 3, 4, 9, 0, 0], (8, 9)) == ContinuationFacts(4, 0.0, True)
    assert ContinuationFacts.of([1, 2, 3, 4], (8, 9)) == ContinuationFacts(4, 0.0, False)
    assert ContinuationFacts.of([9, 0], (9,)) == ContinuationFacts(0, None, True)


def test_means_leave_out_what_has_no_four_gram_and_no_end_token_is_not_zero():
    some = Behaviour((ContinuationFacts(2, None, True), ContinuationFacts(10, 0.5, False), ContinuationFacts(6, 0.0, False)))
    assert (some.repeated, some.ended, some.tokens, some.ended_words) == (0.25, pytest.approx(1 / 3), 6.0, "33.3%")
    none = Behaviour((ContinuationFacts(10, 0.5, None),))
    assert (none.ended, none.ended_words) == (None, "no end token")
    both = BehaviourComparison(some, "protocol", none)
    assert both.length_ratio == pytest.approx(0.6)
    assert BehaviourComparison(some, "protocol", Behaviour((ContinuationFacts(0, None, True),))).length_ratio is None
    assert ContinuationFacts(10, 0.5, None).words(ContinuationFacts(8, 0.0, None)) == (
        "10 tokens (1.25x dense), repeated 4-grams 50.0%, no end token"
    )


# what the model writes


@pytest.fixture
def end(llama: ModelHandle) -> Iterator[object]:
    """The end tokens of the tiny model, which a test may change."""
    config = llama.module.generation_config
    before = config.eos_token_id
    yield config
    config.eos_token_id = before


def _written(handle: ModelHandle, prompt: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The likeliest tokens one by one, without a cache or a batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + CONFIG.new_tokens:
        with torch.no_grad():
            ids.append(int(handle.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_prompts_are_continued_greedily_as_one_by_one_without_a_cache(llama: ModelHandle, windows: WindowSet, end: object):
    rows = [round(39 * number / 10) for number in range(11)]  # spread over the 40 windows
    prompts = [windows.ids[row, :6].tolist() for row in rows]
    frequent = _written(llama, prompts[0], ())[3]
    end.eos_token_id = [frequent, 0]  # type: ignore[attr-defined]
    result = measure_behaviour(llama, windows, CONFIG)
    expected = [ContinuationFacts.of(_written(llama, prompt, (frequent, 0)), (frequent, 0)) for prompt in prompts]
    assert list(result.compressed.continuations) == expected
    assert result.compressed.ended > 0
    assert result.dense is None
    assert result.protocol == (
        "random tokens, calibration split: 11 prompts, the first 6 tokens of a window each; up to 24 new tokens, greedy, with a cache"
    )


def test_the_dense_model_next_to_itself_behaves_the_same(llama: ModelHandle, windows: WindowSet):
    counted: list[tuple[int, int]] = []
    result = measure_behaviour(llama, windows, CONFIG, against=llama, progress=lambda done, total: counted.append((done, total)))
    assert result.dense == result.compressed
    assert result.length_ratio == 1.0
    assert counted == [(8, 22), (11, 22), (19, 22), (22, 22)]
    assert measure_behaviour(llama, windows, CONFIG, against=result.dense) == result


def test_a_model_without_an_end_token_says_so(llama: ModelHandle, windows: WindowSet, end: object):
    end.eos_token_id = None  # type: ignore[attr-defined]
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.eos_token = None
    result = measure_behaviour(replace(llama, tokenizer=tokenizer), windows, CONFIG).compressed
    assert (result.ended, result.tokens, result.ended_words) == (None, CONFIG.new_tokens, "no end token")


def test_what_does_not_fit_is_refused(llama: ModelHandle, windows: WindowSet):
    with pytest.raises(ConfigError, match=r"prompts of 17 tokens are longer than a window of the text, 16\. Lower --prompt-tokens"):
        measure_behaviour(llama, windows, BehaviourConfig(prompt_tokens=17))
    with pytest.raises(ConfigError, match="8 prompt tokens and 57 new ones pass the 64 positions"):
        measure_behaviour(llama, windows, BehaviourConfig(prompt_tokens=8, new_tokens=57))


# where it is shown


def _lowrank(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def test_evaluate_reports_it_on_request(llama_checkpoint: Path, text_file: Path):
    common = ["evaluate", "--model", llama_checkpoint, "--against", llama_checkpoint, "--text", f"file:{text_file}"]
    common += ["--context", 32, "--windows", 4]
    sizes = ["--prompts", 3, "--prompt-tokens", 5, "--new-tokens", 12]
    _, printed, _ = _lowrank(*common, "--behaviour", *sizes)
    rows = printed[printed.index("behaviour ") :].splitlines()
    assert [row.split()[0] for row in rows[1:3]] == ["dense", "compressed"]
    assert rows[2].endswith("1.00x")
    assert "3 prompts, the first 5 tokens of a window each" in rows[3]
    body = json.loads(_lowrank(*common, "--behaviour", *sizes, "--json")[1])["behaviour"]
    assert body["length_over_dense"] == 1.0
    assert body["dense"] == body["compressed"]
    assert len(body["dense"]["continuations"]) == 3
    assert {"repeated_4grams", "ended", "tokens"} <= set(body["dense"])
    status, _, refused = _lowrank(*common, *sizes)
    assert (status, refused.count("\n")) == (2, 1)
    assert "prompts and new tokens are those of --behaviour" in refused
    assert "behaviour" not in json.loads(_lowrank(*common, "--json")[1])


@pytest.fixture(scope="module")
def run(llama_checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search whose worker was asked for the behaviour of two models."""
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=4, test_windows=6)
    search = SearchConfig(compression_ratio=0.3, trials=1, confirmed=1)
    config = RunConfig(ModelSource(str(llama_checkpoint)), text, CalibrationConfig(group_size=8), search)
    result = create_run(config, path=tmp_path_factory.mktemp("behaviour") / "run")
    run_worker(result, verbose=False)
    for trial in (0, "uniform"):
        client.submit(result, "behaviour", launch=False, trial=trial, prompts=3, prompt_tokens=5, new_tokens=12)
    client.submit(result, "generate", launch=False, trial=0, prompt="the rank", tokens=5)
    client.submit(result, "export", launch=False, trial=0)
    run_worker(result, verbose=False)
    return result


def test_a_worker_measures_it_once_for_the_dense_model(run: Run):
    first, second = answers_of(run, BehaviourAnswer)
    assert (first.trial, second.trial) == (0, "uniform")
    assert first.result == second.result  # trial 0 is the uniform rule
    (table,) = behaviours(client.results(run))
    assert list(table.frame["model"]) == ["Dense", "Uniform"]
    assert "6 prompts" not in table.caption
    assert "3 prompts" in table.caption


def test_the_card_and_the_report_have_it(run: Run):
    figures = metrics_of_trial(run, 0)
    assert figures["behaviour"] == answers_of(run, BehaviourAnswer)[0].result.to_mapping()
    assert behaviour_of(run, "uniform") == {"behaviour": answers_of(run, BehaviourAnswer)[1].result.to_mapping()}
    assert behaviour_of(run, "healed:trial-0") == {}
    card = next((run.path / "exports").glob("*/README.md")).read_text(encoding="utf-8")
    section = card[card.index("## Behaviour") :].split("##")[1]
    assert "| dense |" in section
    assert "| compressed |" in section
    assert "Protocol: " in section
    report = report_html(run)
    assert "Behaviour in continuations" in report
    assert "repeated 4-grams" in report or "cut at the limit" in report or "ended by itself" in report


def test_a_card_without_it_has_no_such_section(model: CompressedModel, tmp_path: Path):
    from lowrank_core.export import export

    export(model, tmp_path / "out")
    assert "## Behaviour" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def model(llama_checkpoint: Path) -> CompressedModel:
    from exported import all_forms

    from lowrank_core.models import load_model

    return all_forms(load_model(ModelSource(str(llama_checkpoint))))

"""Tasks through lm-eval, from local files: scores equal those of plain torch, and what can't be run is reported."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.config import ModelSource
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.tasks import TasksConfig, TasksReport, run_tasks

pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")

from lowrank_core.tasks import harness as harness_module
from lowrank_core.tasks import running
from lowrank_core.tasks.harness import Answers, Harness

DOCUMENTS = [
    {
        "question": f"{number} the rank of a matrix tells how many",
        "choices": ["directions it has", "of them", f"a budget says {number}", "keep"],
        "answer": number % 4,
    }
    for number in range(12)
]

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""

ROLLING = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""

GROUP = """
group: both
task: [colours, numbers]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with choices, a group of them, and one without choices."""
    result = tmp_path_factory.mktemp("tasks")
    data, cache = result / "questions.jsonl", tmp_path_factory.mktemp("cache")
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    for name in ("colours", "numbers"):
        (result / f"{name}.yaml").write_text(CHOICES.format(name=name, data=data, cache=cache), encoding="utf-8")
    (result / "words.yaml").write_text(ROLLING.format(data=data, cache=cache), encoding="utf-8")
    (result / "both.yaml").write_text(GROUP, encoding="utf-8")
    return result


@pytest.fixture(scope="module")
def other(qwen2_checkpoint: Path) -> ModelHandle:
    return load_model(ModelSource(str(qwen2_checkpoint)))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_module, "_hub_answers", lambda: False)


def _loglikelihood(handle: ModelHandle, context: str, continuation: str) -> float:
    """Σ log p of the tokens that ``continuation`` adds to ``context``."""
    return _summed(handle, handle.tokenizer(context + continuation)["input_ids"], len(handle.tokenizer(context)["input_ids"]))


def _summed(handle: ModelHandle, tokens: list[int], given: int) -> float:
    """Σ log p of the tokens after the first ``given``."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = handle.module(input_ids=ids, use_cache=False).logits[0, :-1]
    chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(chosen[given - 1 :].sum())


def _right(handle: ModelHandle, *, normalised: bool) -> list[bool]:
    """Whether the likeliest choice of each document, by character or not, is the answer."""
    right = []
    for document in DOCUMENTS:
        values = [_loglikelihood(handle, document["question"], f" {choice}") for choice in document["choices"]]
        lengths = [len(choice) if normalised else 1 for choice in document["choices"]]
        scored = [value / length for value, length in zip(values, lengths, strict=True)]
        right.append(scored.index(max(scored)) == document["answer"])
    return right


def _asked(handle: ModelHandle, folder: Path, *tasks: str, against: ModelHandle | None = None, **settings: int) -> TasksReport:
    return run_tasks(handle, TasksConfig(tasks, str(folder), **settings), against=against)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_accuracy_is_that_of_plain_torch(any_handle: ModelHandle, folder: Path, batch_size: int):
    report = _asked(any_handle, folder, "colours", batch_size=batch_size)
    acc, norm = report.scores
    assert (acc.metric, norm.metric) == ("acc", "acc_norm")
    for score, normalised in ((acc, False), (norm, True)):
        right = _right(any_handle, normalised=normalised)
        assert score.value == pytest.approx(statistics.fmean(right))
        assert score.stderr == pytest.approx(statistics.stdev(right) / math.sqrt(12))
        assert (score.task, score.filter, score.documents, score.few_shot) == ("colours", "none", 12, 0)
        assert (score.version, score.higher_is_better, score.dense, score.difference) == ("2.0", True, None, None)


def test_the_difference_is_paired_by_document(llama: ModelHandle, other: ModelHandle, folder: Path):
    for score in _asked(llama, folder, "colours", against=other).scores:
        ours, theirs = (_right(handle, normalised=score.metric == "acc_norm") for handle in (llama, other))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        assert score.dense == pytest.approx(statistics.fmean(theirs))
        assert score.difference == pytest.approx(statistics.fmean(differences))
        assert score.difference_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(12))


def test_a_model_differs_from_itself_by_nothing(llama: ModelHandle, folder: Path):
    for score in _asked(llama, folder, "colours", against=llama).scores:
        assert (score.difference, score.difference_stderr) == (0, 0)


def test_a_group_is_scored_and_patterns_name_tasks(llama: ModelHandle, other: ModelHandle, folder: Path):
    report = _asked(llama, folder, "both", against=other)
    rows = {(score.task, score.metric): score for score in report.scores}
    whole, part = rows["both", "acc"], rows["numbers", "acc"]
    assert (whole.value, whole.dense, whole.documents) == (part.value, part.dense, 24)
    assert whole.difference_stderr is None
    assert {score.task for score in _asked(llama, folder, "[cn]*s").scores} == {"colours", "numbers"}


def test_a_score_that_is_no_mean_has_a_difference_without_an_error(llama: ModelHandle, other: ModelHandle, folder: Path):
    (score,) = _asked(llama, folder, "words", against=other).scores
    # lm-eval puts BOS before what the tokenizer gives, even if that begins with BOS.
    nll = sum(-_summed(llama, [0, *llama.tokenizer(document["question"])["input_ids"]], 1) for document in DOCUMENTS)
    words = sum(len(document["question"].split()) for document in DOCUMENTS)
    assert score.value == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert score.dense is not None
    assert score.difference == pytest.approx(score.value - score.dense)
    assert score.difference_stderr is None


def test_limits_and_examples_are_told_in_the_scores(llama: ModelHandle, folder: Path):
    report = _asked(llama, folder, "colours", limit=5, few_shot=1)
    assert {(score.documents, score.few_shot) for score in report.scores} == {(5, 1)}
    assert "the first 5 documents" in report.protocol
    assert "lm-eval" in report.protocol


def test_questions_that_are_cut_are_told(llama: ModelHandle, folder: Path):
    assert _asked(llama, folder, "colours").warnings == ()
    (warning,) = _asked(llama, folder, "colours", few_shot=6).warnings
    assert "exceeds model's maximum length (64)" in warning
    assert "like this)" in warning


def test_nothing_of_the_model_changes(llama: ModelHandle, folder: Path):
    before, padding = llama.fingerprint, llama.tokenizer.pad_token
    state = torch.random.get_rng_state()
    _asked(llama, folder, "colours")
    assert torch.equal(state, torch.random.get_rng_state())
    assert llama.tokenizer.pad_token == padding
    assert load_model(ModelSource(llama.reference)).fingerprint == before


# --- what can't be run -------------------------------------------------------------------------------------------------


def test_the_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r'not installed .*pip install "lowrank-studio\[tasks\]"'):
        Harness(TasksConfig(("colours",), str(folder)))


def test_an_unknown_task_is_told_with_similar_names(folder: Path, monkeypatch: pytest.MonkeyPatch):
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: real(include_path=include_path, include_defaults=False))
    with pytest.raises(ConfigError, match=r"'colour' is not known to lm-eval .* Did you mean colours\?"):
        Harness(TasksConfig(("colour",), str(folder)))
    with pytest.raises(ConfigError, match="lm-eval ls tasks"):
        Harness(TasksConfig(("zzzzzz",), str(folder)))


def test_a_hub_out_of_reach_is_told_at_once(llama: ModelHandle, tmp_path: Path):
    lines = CHOICES.format(name="far", data="x", cache="x").replace("json\n", "nobody/nothing-of-this-name\n").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("dataset_kwargs"))
    (tmp_path / "far.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the data of far are on the hub, which is out of reach .*nobody.*--include-path"):
        _asked(llama, tmp_path, "far")


def test_missing_files_are_told(llama: ModelHandle, tmp_path: Path):
    (tmp_path / "gone.yaml").write_text(CHOICES.format(name="gone", data=tmp_path / "gone.jsonl", cache=tmp_path), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the data of gone can't be loaded .*gone\.jsonl.*data_files start from the working directory"):
        _asked(llama, tmp_path, "gone")


def test_tasks_that_run_code_of_the_model_are_refused(llama: ModelHandle, folder: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(ConfigError, match="colours runs code that the model writes"):
        _asked(llama, folder, "colours")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"few_shot": -1}, "few shot must be at least 0"),
        ({"include_path": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        TasksConfig(("colours",), **settings)
    with pytest.raises(ConfigError, match="name at least one"):
        TasksConfig(())


def test_a_score_that_is_not_finite_is_refused():
    results = {
        "results": {"t": {"acc,none": math.nan, "acc_stderr,none": "N/A", "sample_len": 1}},
        "n-shot": {},
        "versions": {},
        "higher_is_better": {},
    }
    with pytest.raises(NumericalError, match=r"t: acc is nan, no finite number.*perplexity"):
        list(running._scores(Answers(results, ())))


def test_differences_need_the_same_documents_and_means():
    ours, theirs = {0: 1.0, 1: 0.0, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 1.0}
    assert running._paired_stderr(ours, theirs, 2 / 3, 1 / 3) == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert running._paired_stderr(ours, theirs, 0.9, 1 / 3) is None
    assert running._paired_stderr(ours, {0: 0.0, 1: 0.0}, 2 / 3, 0.0) is None
    assert running._paired_stderr({0: 1.0}, {0: 1.0}, 1.0, 1.0) is None
    assert running._paired_stderr({0: None, 1: 1.0}, {0: 1.0, 1: 1.0}, 1.0, 1.0) is None


def test_warnings_of_a_kind_are_told_once():
    reported = ["cut 3 of 70 tokens", "no such metric", "cut 5 of  70\ntokens"]
    assert harness_module._by_kind(reported[:2]) == ("cut 3 of 70 tokens", "no such metric")
    assert harness_module._by_kind(["cut 3 of 70", "cut 5 of 70"]) == ("cut 3 of 70 (2 like this)",)


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_shows_both_models(llama_checkpoint: Path, qwen2_checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    models = ["--model", str(llama_checkpoint), "--against", str(qwen2_checkpoint)]
    arguments = ["tasks", *models, "--tasks", "colours", "--include-path", str(folder), "--limit", "4"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [score["metric"] for score in result["scores"]] == ["acc", "acc_norm"]
    assert result["against"] == str(qwen2_checkpoint)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in ("compressed", "difference", "colours  acc_norm", "±", "the first 4 documents"):
        assert word in text


def test_an_unknown_task_costs_no_loading(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tasks", "--model", "/nowhere/at/all", "--tasks", "colours", "--include-path", str(folder / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err

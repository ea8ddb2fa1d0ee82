"""What evaluations may not claim: an interval from one window, and that a model is close to one that predicts nothing."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import VOCABULARY

from lowrank_core.cli import main
from lowrank_core.commands.evaluate import _one, _several
from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, RunConfig
from lowrank_core.evaluation import DenseReference, EvaluationReport, evaluate
from lowrank_core.evaluation.intervals import Sample, bootstrap_interval
from lowrank_core.evaluation.warnings import FEW_WINDOWS, uniform_warning, window_warning
from lowrank_core.export.manifest import measurement_from
from lowrank_core.export.measuring import metrics_of
from lowrank_core.models import ModelHandle
from lowrank_core.runs import Run, create_run
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet
from lowrank_core.worker.reporter import Reporter

SAYS_NOTHING = "the dense model is no better than a uniform guess on this text"
INTERVALS = [name for name in EvaluationReport.__dataclass_fields__ if name.endswith("_interval")]


@pytest.fixture(scope="module")
def smaller(llama: ModelHandle, windows: WindowSet) -> ModelHandle:
    decomposed = decompose(llama, collect_statistics(llama, windows, CalibrationConfig()), CompressionConfig(value_dense=False))
    return decomposed.compress(decomposed.allocate("uniform", 0.5), windows).handle


@pytest.fixture(scope="module")
def silent(llama: ModelHandle) -> ModelHandle:
    """A model whose logits are all zero."""
    module = copy.deepcopy(llama.module)
    with torch.no_grad():
        module.get_input_embeddings().weight.zero_()  # tied: the head, too
    return replace(llama, module=module)


def first(windows: WindowSet, count: int) -> WindowSet:
    return replace(windows, ids=windows.ids[:count])


# --- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [np.array([2.5]), np.array([[2.5, 2.0]]), np.full(12, 2.5), np.tile([2.5, 2.0], (12, 1))])
def test_where_no_spread_was_seen_there_is_no_interval(rows: np.ndarray):
    assert bootstrap_interval(np.exp if rows.ndim == 1 else lambda pair: pair[..., 0] - pair[..., 1], rows) is None
    assert bootstrap_interval(np.exp if rows.ndim == 1 else lambda pair: pair[..., 0] - pair[..., 1], rows, np.full(len(rows), 7)) is None


def test_one_window_has_no_interval_of_anything(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet):
    report = evaluate(smaller, first(windows, 1), against=llama)
    assert [getattr(report, name) for name in INTERVALS] == [None] * len(INTERVALS)
    assert report.nll_stderr is None
    body = json.loads(json.dumps(report.to_mapping()))
    assert {name: body[name] for name in INTERVALS} == dict.fromkeys(INTERVALS)
    assert set(json.loads(json.dumps(evaluate(smaller, first(windows, 1)).to_mapping()))) & set(INTERVALS) == {"perplexity_interval"}
    for words in (_one(report), _several([report])):
        assert "no interval" in words
        assert "warning: one window of text alone" in words
        assert " to " not in words.split("warning")[0]


def test_one_run_of_overlapping_windows_has_no_interval(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet):
    """Three windows that overlap by all but five tokens score about one context of text: nothing is known of another."""
    scored = torch.zeros(3, windows.context - 1, dtype=torch.bool)
    scored[:, -5:] = True
    strided = replace(first(windows, 3), scored=scored, stride=5)
    report = evaluate(smaller, strided, against=llama)
    assert [getattr(report, name) for name in INTERVALS] == [None] * len(INTERVALS)
    assert "one window" in report.warnings[0]


@pytest.mark.parametrize("count", [2, FEW_WINDOWS - 1, FEW_WINDOWS])
def test_few_windows_have_an_interval_and_a_warning(smaller: ModelHandle, llama: ModelHandle, windows: WindowSet, count: int):
    report = evaluate(smaller, first(windows, count), against=llama)
    assert report.kl_interval is not None
    reported = [warning for warning in report.warnings if "windows of text alone" in warning]
    assert [warning.split()[0] for warning in reported] == ([str(count)] if count < FEW_WINDOWS else [])
    assert len(window_warning(Sample(np.arange(count)))) == len(reported)


def test_a_folder_measured_on_one_window_is_read_again():
    protocol = {"text": "t", "split": "test", "windows": 1, "context": 8, "bos": "none", "seed": 0, "dtype": "float32"}
    body = {"perplexity": 3.0, "perplexity_interval": None, "nll": 1.1, "protocol": {**protocol, "sha256": "", "line": "one window"}}
    assert measurement_from(body).perplexity_interval is None


# --- a model that predicts nothing -------------------------------------------------------------------------------------


def test_a_silent_dense_model_is_told(silent: ModelHandle, windows: WindowSet):
    report = evaluate(silent, windows, against=silent)
    assert report.dense_nll == pytest.approx(math.log(VOCABULARY), abs=1e-6)
    assert (report.kl, report.top1_agreement) == (0.0, 1.0)
    (reported,) = report.warnings
    assert reported.startswith(SAYS_NOTHING)
    assert "KL and agreement say nothing" in reported
    assert "-0.0000" not in _one(report)
    assert f"warning: {reported}" in _one(report)
    assert f"warning: {reported}" in _several([report])
    assert metrics_of(report.to_mapping())["warnings"] == [reported]


def test_what_is_measured_alone_is_told_too(silent: ModelHandle, windows: WindowSet):
    (reported,) = evaluate(silent, windows).warnings
    assert reported.startswith("the model is no better than a uniform guess")


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"top_k": 16}])
def test_what_trials_are_compared_with_is_judged(llama: ModelHandle, silent: ModelHandle, windows: WindowSet, options: dict[str, object]):
    result = DenseReference.compute(silent, windows, batch_size=7, **options)  # type: ignore[arg-type]
    (reported,) = result.warnings
    assert reported.startswith(SAYS_NOTHING)
    other = DenseReference.compute(llama, windows, batch_size=7, **options)  # type: ignore[arg-type]
    assert other.nll is not None
    assert other.nll.tolist() == pytest.approx(evaluate(llama, windows).window_nll, rel=1e-5)


def test_noise_decides_what_is_below_a_uniform_guess():
    def reported(mean: float, spread: float, windows: int = 16) -> bool:
        means = mean + spread * np.tile([-1.0, 1.0], windows // 2)
        return bool(uniform_warning(Sample(means), 512, name="the model", compared=False))

    uniform = math.log(512)
    assert not reported(uniform - 1.0, 0.5)
    assert reported(uniform + 1.0, 0.5)
    assert reported(uniform - 0.1, 0.5)  # its standard error is 0.13
    assert not reported(uniform - 0.1, 0.05)
    assert reported(uniform - 1e-5, 0.0)  # rounding


@pytest.fixture
def run() -> Run:
    return create_run(RunConfig())


def test_a_run_keeps_what_is_said_of_its_dense_model(run: Run):
    reporter = Reporter(run, verbose=False)
    reporter.say(dense_warnings=(SAYS_NOTHING,))
    reporter.say(warnings=("other",))
    reporter.close("finished")
    assert run.status().dense_warnings == (SAYS_NOTHING,)


def test_the_command_warns(capsys: pytest.CaptureFixture[str], silent: ModelHandle, text_file: Path, tmp_path: Path):
    silent.module.save_pretrained(tmp_path)
    silent.tokenizer.save_pretrained(tmp_path)
    where = ["--model", str(tmp_path), "--text", f"file:{text_file}", "--context", "32", "--windows", "1", "--against", str(tmp_path)]
    assert main(["evaluate", *where]) == 0
    words = capsys.readouterr().out
    assert f"warning: {SAYS_NOTHING}" in words
    assert "warning: one window of text alone" in words
    assert "-0.0000" not in words

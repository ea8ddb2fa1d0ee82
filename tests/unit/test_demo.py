"""The bundled model and the recorded run are what their cards say."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from lowrank_core.cli import main
from lowrank_core.config import ModelSource, TextConfig
from lowrank_core.evaluation import evaluate
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.runs import recorded_run
from lowrank_core.studies.records import best_trial, read_trials
from lowrank_core.text import load_windows

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo-lm"


@pytest.fixture(scope="module")
def demo() -> ModelHandle:
    return load_model(ModelSource("demo"))


def test_the_bundled_model_has_the_shape_on_its_card(demo: ModelHandle) -> None:
    config = demo.module.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (256, 8, 688)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (4096, 512)
    assert len(demo.layers) == 56
    assert demo.stored_dtype == torch.bfloat16
    assert demo.module.get_input_embeddings().weight is demo.module.get_output_embeddings().weight
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 20e6


def test_it_was_trained(demo: ModelHandle) -> None:
    """On held-out modules it is far better than the best guess that does not look at the context."""
    windows = load_windows(TextConfig(context=256), demo.tokenizer, "test", count=12)
    report = evaluate(demo, windows)
    tokens = windows.ids[:, 1:].flatten().tolist()
    counts = Counter(tokens)
    unigram = -sum(math.log(counts[token] / len(tokens)) for token in tokens) / len(tokens)  # fitted to the test text itself
    assert report.nll < unigram - 1.5


def test_the_recorded_run_is_real_and_small() -> None:
    run = recorded_run()
    assert run is not None
    assert run.recorded
    assert run.config.search is not None
    trials = read_trials(run)
    best = best_trial(trials)
    assert best is not None
    assert sum(trial.state == "complete" for trial in trials) == run.config.search.trials
    baselines = [trial.value for trial in trials if trial.label != "sampled"]
    assert len(baselines) == 3
    assert all(best.value <= value for value in baselines if value is not None)
    assert sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) < 2e6
    assert not list(run.path.rglob("*.safetensors"))


def test_the_recorded_run_is_of_the_bundled_model(demo: ModelHandle) -> None:
    run = recorded_run()
    assert run is not None
    model = run.part("model")
    assert model is not None
    assert model["fingerprint"] == demo.fingerprint


@pytest.mark.slow
def test_the_whole_pipeline_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, ratio = str(tmp_path / "run"), "0.3"
    command = [
        "search",
        "--model",
        "demo",
        "--text",
        "python-stdlib",
        "--compression-ratio",
        ratio,
        "--trials",
        "8",
        "--run",
        run,
        "--json",
    ]
    assert main(command) == 0
    search = json.loads(capsys.readouterr().out)
    assert search["value"] <= min(figures["value"] for figures in search["baselines"].values())
    assert search["compression_ratio"] >= float(ratio)
    evaluation = ["evaluate", "--model", search["export"], "--against", "demo", "--text", "python-stdlib", "--windows", "32", "--json"]
    assert main(evaluation) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compression_ratio"] == pytest.approx(search["compression_ratio"])
    assert 0 < report["kl"] < 0.5
    assert report["top1_agreement"] > 0.7

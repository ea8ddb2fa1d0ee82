"""What is chosen on validation text is the best of what was measured there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_core.cli import main
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.tuning import BETAS, DAMPINGS, TuningPoint, _best, tune
from lowrank_core.config import CalibrationConfig, CompressionConfig, TextConfig
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.evaluation import evaluate
from lowrank_core.metrics import metric_named, with_beta
from lowrank_core.models import ModelHandle
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.text import TokenWindows, load_text

STUDIO = CompressionConfig(basis="drift_aware:two_sided", storage="pivoted", value_dense=False)


@pytest.fixture(scope="module")
def text(llama: ModelHandle, text_file: Path) -> TokenWindows:
    config = TextConfig(f"file:{text_file}", context=32, calibration_windows=40, validation_windows=6, test_windows=6)
    return load_text(config, llama.tokenizer)


@pytest.fixture(scope="module")
def statistics(llama: ModelHandle, text: TokenWindows) -> LayerStatistics:
    config = CalibrationConfig()
    return collect_statistics(llama, text.calibration, config).with_outputs(collect_gradients(llama, text.calibration, config))


def test_the_setting_with_the_lowest_kl_on_validation_text_is_taken(llama: ModelHandle, statistics: LayerStatistics, text: TokenWindows):
    ticks: list[tuple[int, int]] = []
    progress = lambda done, total: ticks.append((done, total))  # noqa: E731
    result, points = tune(llama, statistics, STUDIO, text, allocator="lagrangian", compression_ratio=0.5, progress=progress)
    assert {point.gradient_damping for point in points} == set(DAMPINGS)
    assert {point.drift_beta for point in points} == set(BETAS)
    best = min(points, key=lambda point: point.kl or 0.0)
    assert (result.gradient_damping, result.drift_beta) == (best.gradient_damping, best.drift_beta)
    assert result == replace(STUDIO, gradient_damping=best.gradient_damping, drift_beta=best.drift_beta)
    assert ticks == [(done, len(points)) for done in range(1, len(points) + 1)]
    decomposed = decompose(llama, statistics, result)
    model = decomposed.compress(decomposed.allocate("lagrangian", 0.5), text.calibration)
    assert evaluate(model.handle, text.validation, against=llama).kl == pytest.approx(best.kl, rel=1e-3)


def test_what_a_basis_does_not_have_is_not_tried(llama: ModelHandle, statistics: LayerStatistics, text: TokenWindows):
    plain = CompressionConfig(basis="whitened", value_dense=False)
    result, points = tune(llama, statistics, plain, text, allocator="uniform", compression_ratio=0.4)
    assert result == plain
    assert len(points) == 1


def test_the_beta_of_a_preset_is_among_those_tried(llama: ModelHandle, statistics: LayerStatistics, text: TokenWindows):
    """MPIFA's 0.25 is none of the usual ones: a tuned preset must not be worse than an untuned one for that."""
    _, points = tune(llama, statistics, PRESETS["mpifa"].compression, text, allocator="uniform", compression_ratio=0.4)
    assert {point.drift_beta for point in points} == {0.25, *BETAS}


def test_a_search_for_ranks_is_measured_for_tuning_too(llama: ModelHandle, statistics: LayerStatistics, text: TokenWindows):
    asvd = PRESETS["asvd"]
    result, points = tune(llama, statistics, asvd.compression, text, allocator=asvd.allocation, compression_ratio=0.4)
    assert result == asvd.compression
    assert len(points) == 1


def test_beta_reaches_the_basis_through_wrappers():
    for name in ("drift_aware", "drift_aware:two_sided", "shared_input:drift_aware:whitened"):
        changed = with_beta(metric_named(name), 0.25)
        assert "beta=0.25" in repr(changed)
    assert with_beta(metric_named("whitened"), 0.25) == metric_named("whitened")


def test_a_model_that_diverges_everywhere_is_an_error():
    with pytest.raises(NumericalError, match="Lower the compression ratio"):
        _best([TuningPoint(0.01, 1.0, None)])


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_beta_is_a_share(beta: float):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        CompressionConfig(drift_beta=beta)


def test_the_command_tells_what_it_tried_and_keeps_it_in_the_export(llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys):
    source = ["--model", str(llama_checkpoint), "--text", f"file:{text_file}", "--context", "32", "--windows", "40"]
    options = ["--basis", "two_sided", "--allocation", "lagrangian", "--compression-ratio", "0.4", "--tune", "--out", str(tmp_path / "out")]
    assert main(["compress", *source, *options, "--json"]) == 0
    reported = capsys.readouterr()
    body = json.loads(reported.out)
    assert len(body["tuning"]) == len(DAMPINGS)
    assert reported.err.count("on validation text") == len(DAMPINGS)
    assert json.loads((tmp_path / "out" / "lowrank.json").read_text())["gradient_damping"] == body["gradient_damping"]
    assert main(["compress", *source, "--ranks", "ranks.json", "--tune", "--out", str(tmp_path / "other")]) == 2

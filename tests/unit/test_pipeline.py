"""One pipeline: each stage is computed when it is asked for, once, and is what its functions give one by one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from lowrank_core.compression import pipeline as module
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, TextConfig
from lowrank_core.errors import ConfigError
from lowrank_core.models import load_model
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import load_text
from lowrank_core.types import Progress

CALIBRATION = CalibrationConfig(group_size=4, gradient_windows=8)


@pytest.fixture
def text(text_file: Path) -> TextConfig:
    return TextConfig(f"file:{text_file}", context=32, calibration_windows=16, validation_windows=4, test_windows=4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each stage is computed."""
    result: Counter[str] = Counter()

    def counted(name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: object, **options: object) -> object:
            result[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("load_model", "load_text", "cached_statistics", "cached_gradients", "decompose"):
        counted(name)
    return result


def test_two_ratios_calibrate_and_decompose_once(llama_checkpoint: Path, text: TextConfig, calls: Counter[str]):
    pipeline = Pipeline(str(llama_checkpoint), text, calibration=CALIBRATION)
    assert not calls, "nothing is computed before it is asked for"
    ratios = [pipeline.compress(ratio).report.compression_ratio for ratio in (0.2, 0.4)]
    assert 0.2 <= ratios[0] < 0.4 <= ratios[1]
    assert pipeline.windows.test.windows == 4
    assert set(calls.values()) == {1}
    assert len(calls) == 5


def test_the_stages_are_those_of_the_functions(llama_checkpoint: Path, text: TextConfig):
    config = CompressionConfig(value_dense=False)
    model = Pipeline(str(llama_checkpoint), text, calibration=CALIBRATION, compression=config).compress(0.3)
    handle = load_model(ModelSource(str(llama_checkpoint)))
    windows = load_text(text, handle.tokenizer).calibration
    decomposed = decompose(handle, collect_statistics(handle, windows, CALIBRATION), config)
    expected = decomposed.compress(decomposed.allocate("uniform", 0.3), windows)
    assert model.report == expected.report
    one, other = model.handle.module.state_dict(), expected.handle.module.state_dict()
    for name in other:  # factors are kept in float32
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_another_way_to_compress_shares_model_windows_and_moments(llama_checkpoint: Path, text: TextConfig, calls: Counter[str]):
    plain = Pipeline(str(llama_checkpoint), text, calibration=CALIBRATION, compression="svd")
    plain.compress(0.3)
    other = plain.under(PRESETS["svd_llm"])
    assert other.handle is plain.handle
    assert other.compress(0.3).report.parameters_after <= plain.handle.parameters
    assert calls["decompose"] == 2
    assert calls["cached_statistics"] == calls["load_model"] == 1
    assert calls["cached_gradients"] == 0
    assert plain.under(plain.compression) is plain


def test_a_stage_that_is_ended_is_not_kept(llama_checkpoint: Path, text: TextConfig, calls: Counter[str]):
    def refuse(done: int, total: int) -> None:
        raise KeyboardInterrupt

    pipeline = Pipeline(str(llama_checkpoint), text, calibration=CALIBRATION, compression="svd", progress=lambda name, total: _Told(refuse))
    with pytest.raises(KeyboardInterrupt):
        _ = pipeline.moments
    pipeline.progress = module.silent
    assert pipeline.compress(0.3).report.compression_ratio >= 0.3
    assert calls["cached_statistics"] == 2
    assert calls["load_model"] == 1


class _Told:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> Progress:
        return self._progress

    def __exit__(self, *_: object) -> None:
        return None


def test_a_preset_is_checked_at_once():
    with pytest.raises(ConfigError, match="nothing_like_it"):
        Pipeline("demo", compression="nothing_like_it")

"""What a compression takes of memory, and a budget that can't be kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_core.compression.memory import check_memory, memory_needed
from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, TextConfig
from lowrank_core.errors import ModelError
from lowrank_core.models import ModelHandle
from lowrank_core.presets.recipes import DEFAULT_PRESET

TEXT, CALIBRATION, STUDIO = TextConfig(context=16, calibration_windows=8), CalibrationConfig(), DEFAULT_PRESET.compression


def test_stages_that_are_not_run_take_nothing(llama: ModelHandle) -> None:
    plain = memory_needed(llama, TEXT, CALIBRATION, CompressionConfig(basis="whitened"))
    assert plain.stages.keys() == {"Calibrating", "Factorising", "Writing and measuring"}
    assert memory_needed(llama, TEXT, CALIBRATION, STUDIO).stages.keys() == {*plain.stages, "Measuring gradients", "Compressing"}


def test_the_total_is_what_is_taken_and_the_largest_stage(llama: ModelHandle) -> None:
    need = memory_needed(llama, TEXT, CALIBRATION, STUDIO)
    assert need.total == need.now + max(need.stages.values())
    assert need.stages[need.most] == max(need.stages.values())
    assert need.now > 10**8  # torch alone


def test_fewer_windows_in_a_pass_take_less(llama: ModelHandle) -> None:
    sizes = [memory_needed(llama, TEXT, replace(CALIBRATION, batch_size=size), STUDIO).stages for size in (1, 2, 4)]
    for stage in ("Calibrating", "Measuring gradients", "Compressing", "Writing and measuring"):
        first, second, fourth = (each[stage] for each in sizes)
        assert fourth - second == 2 * (second - first) > 0


def test_a_budget_that_suffices_is_not_told(llama: ModelHandle) -> None:
    check_memory(llama, TEXT, CALIBRATION, STUDIO, None)
    check_memory(llama, TEXT, CALIBRATION, STUDIO, 10**12)


def test_a_budget_that_can_not_be_kept_is_refused_with_what_would_fit(llama: ModelHandle) -> None:
    with pytest.raises(ModelError, match=r"memory: .* takes about .* and --memory allows 95\.4 MiB\. Give --memory \d\.\dGB, or choose"):
        check_memory(llama, TEXT, CALIBRATION, STUDIO, 10**8)


def test_a_smaller_batch_is_named_where_it_fits(llama: ModelHandle) -> None:
    large = replace(CALIBRATION, batch_size=4096)
    middle = (memory_needed(llama, TEXT, large, STUDIO).total + memory_needed(llama, TEXT, replace(large, batch_size=1), STUDIO).total) // 2
    with pytest.raises(ModelError, match=r"Lower --batch-size to 1, or choose"):
        check_memory(llama, TEXT, large, STUDIO, middle)


def test_nothing_is_measured_before_the_refusal(llama_checkpoint: Path, text_file: Path, lowrank_home: Path) -> None:
    text = TextConfig(f"file:{text_file}", context=16, calibration_windows=8)
    pipeline = Pipeline(ModelSource(str(llama_checkpoint), memory="100MB"), text)
    with pytest.raises(ModelError, match="--memory allows"):
        _ = pipeline.moments
    assert not list(lowrank_home.glob("statistics/*"))

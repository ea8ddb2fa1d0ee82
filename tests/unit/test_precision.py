"""Products in bfloat16: only where the processor has them, only in passes, and known to whoever reads the statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import ConfigError
from lowrank_core.models import ModelHandle
from lowrank_core.statistics import precision
from lowrank_core.statistics.calibration import collect_statistics, inputs_folder, statistics_key
from lowrank_core.statistics.gradients import collect_gradients, gradients_folder, gradients_key
from lowrank_core.statistics.precision import products_in, resolved_precision
from lowrank_core.text import WindowSet

AUTO, EXACT, ROUNDED = (CalibrationConfig(precision=name) for name in ("auto", "float32", "bfloat16"))
WITH_INSTRUCTIONS = precision.has_bfloat16()


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)


def test_auto_is_float32_without_the_instructions_and_bfloat16_is_refused(llama: ModelHandle):
    assert resolved_precision(AUTO, llama) == "float32"
    assert resolved_precision(EXACT, llama) == "float32"
    with pytest.raises(ConfigError, match=r"AVX-512 BF16 or AMX\. Choose the precision auto or float32"):
        resolved_precision(ROUNDED, llama)


@pytest.mark.usefixtures("capable")
def test_auto_is_bfloat16_with_them_for_a_float32_model(llama: ModelHandle):
    assert [resolved_precision(config, llama) for config in (AUTO, EXACT, ROUNDED)] == ["bfloat16", "float32", "bfloat16"]
    narrow = replace(llama, module=type(llama.module)(llama.module.config).to(torch.bfloat16))
    assert resolved_precision(AUTO, narrow) == "float32"  # its products are in its own dtype
    with pytest.raises(ConfigError, match="need a float32 model"):
        resolved_precision(ROUNDED, narrow)


def test_a_run_goes_on_where_the_instructions_are_missing_and_folders_are_of_what_was_done(
    llama: ModelHandle, windows: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def keys(config: CalibrationConfig) -> tuple[str, ...]:
        return statistics_key(llama, windows, config), gradients_key(llama, windows, config)

    def folders(config: CalibrationConfig) -> tuple[str, ...]:
        return tuple(place(llama, windows, config, tmp_path).name for place in (inputs_folder, gradients_folder))

    exact = keys(EXACT), folders(EXACT)
    assert (keys(AUTO), folders(AUTO)) == exact
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    assert (keys(EXACT), folders(EXACT)) == exact
    assert keys(AUTO) == keys(ROUNDED) == exact[0]
    assert folders(AUTO) == folders(ROUNDED)
    assert not set(folders(AUTO)) & set(exact[1])


def test_the_precision_is_set_back_whatever_happens():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products_in("bfloat16"):
        with pytest.raises(KeyError), products_in("float32"):
            raise KeyError(torch.backends.mkldnn.matmul.fp32_precision)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.skipif(not WITH_INSTRUCTIONS, reason="this processor has no products in bfloat16")
@pytest.mark.usefixtures("capable")
def test_rounded_products_move_moments_by_the_digits_of_bfloat16(any_handle: ModelHandle, windows: WindowSet):
    exact, rounded = (collect_statistics(any_handle, windows, config) for config in (EXACT, ROUNDED))
    for name, entry in exact.inputs.items():
        moved = torch.linalg.matrix_norm(rounded.inputs[name].sample - entry.sample) / torch.linalg.matrix_norm(entry.sample)
        assert 0 <= float(moved) < 2**-7
    one, other = (collect_gradients(any_handle, windows, config) for config in (EXACT, ROUNDED))
    ratios = [float(other[name].gradient.trace() / entry.gradient.trace()) for name, entry in one.items()]
    assert max(ratios) < 1.1
    assert min(ratios) > 0.9

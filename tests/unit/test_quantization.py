"""Factors in 8 bits: what rounding may cost, what is counted, and that a folder gives the same back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import assert_cache_changes_nothing
from torch import nn

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.quantization import quantized, quantized_handle
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.errors import ConfigError
from lowrank_core.export import export
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.quantized import Int8Matrix, applied
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet

FORMS = {
    "factored": CompressionConfig(basis="pooled_feature", value_dense=False),
    "pivoted": CompressionConfig(basis="pooled_feature", storage="pivoted", value_dense=False),
    "stacks": CompressionConfig(basis="shared_input:whitened", storage="pivoted", value_dense=False),
    "heads": CompressionConfig(basis="whitened", storage="pivoted", value_dense=False, heads=True),
}


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, llama: ModelHandle, windows: WindowSet) -> CompressedModel:
    statistics = collect_statistics(llama, windows, CalibrationConfig(group_size=8))
    decomposed = decompose(llama, statistics, FORMS[request.param])
    heads = [unit.name for unit in decomposed.units if unit.storage == "per_head"]
    fixed: dict[str, int | None] = dict.fromkeys(heads, 5)
    return decomposed.compress(decomposed.allocate("lagrangian" if heads else "uniform", 0.4, fixed=fixed), windows)


def logits(handle: ModelHandle, windows: WindowSet) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = handle.module(input_ids=windows.ids[:4]).logits
    return result


def layers(handle: ModelHandle) -> dict[str, CompressedModule]:
    return {name: child for name, child in handle.module.named_modules() if isinstance(child, CompressedModule)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_within_half_a_step_of_its_row(dtype: torch.dtype):
    matrix = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7)[None, :, None]
    small = Int8Matrix.of(matrix, dtype)
    assert ((small.dense - matrix).abs() <= small.scales[..., None] * 0.5001).all()
    assert torch.equal(small.scales.to(dtype).to(small.scales.dtype), small.scales)  # a cast to what is stored changes nothing
    assert (small.scales >= matrix.abs().amax(-1) / 127 * (1 - 1e-6)).all()
    assert small.values.dtype == torch.int8


def test_a_row_of_zeros_and_what_is_whole_already_are_exact():
    matrix = torch.tensor([[0.0, 0.0], [127.0, -3.0], [-254.0, 2.0]])
    assert torch.equal(Int8Matrix.of(matrix, torch.float32).dense, matrix)


def test_it_multiplies_as_the_matrix_that_it_stands_for():
    generator = torch.Generator().manual_seed(1)
    matrix, x, bias = torch.randn(6, 5, generator=generator), torch.randn(2, 3, 5, generator=generator), torch.randn(6, generator=generator)
    small = Int8Matrix.of(matrix, torch.float32)
    assert torch.allclose(applied(small, x, bias), nn.functional.linear(x, small.dense, bias), atol=1e-6)
    assert torch.allclose(applied(nn.Parameter(matrix), x, bias), nn.functional.linear(x, matrix, bias))


def test_layers_compute_what_their_rounded_weights_say(model: CompressedModel):
    handle = quantized_handle(model.handle)
    for name, layer in layers(handle).items():
        assert layer.int8, name
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
        bias = layer.bias if isinstance(layer.bias, torch.Tensor) else None
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, bias), atol=1e-4), name
        exact = layers(model.handle)[name].weight
        assert float((layer.weight - exact).norm() / exact.norm()) < 0.05, name


def test_the_given_model_stays_and_the_outputs_are_close(model: CompressedModel, windows: WindowSet):
    before = logits(model.handle, windows)
    handle = quantized_handle(model.handle)
    assert torch.equal(logits(model.handle, windows), before)
    change = (logits(handle, windows) - before).norm() / before.norm()
    assert 0 < float(change) < 0.05


def test_counts_are_those_of_the_written_file(model: CompressedModel, tmp_path: Path):
    small = quantized(model)
    assert small.report.quantization == "int8"
    assert small.report.bytes_after == small.handle.bytes < model.report.bytes_after
    scales = sum(child.scales.numel() for child in small.handle.module.modules() if isinstance(child, Int8Matrix))
    assert small.report.parameters_after == model.report.parameters_after + scales
    assert small.report.linear_parameters_after == model.report.linear_parameters_after + scales
    export(small, tmp_path / "out", provenance={})
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert small.handle.bytes <= stored < small.handle.bytes + 20_000  # the header
    saved = sum(unit.bytes for unit in model.report.units) - sum(unit.bytes for unit in small.report.units)
    assert saved == model.report.bytes_after - small.report.bytes_after


def test_a_folder_gives_back_the_same_model(model: CompressedModel, windows: WindowSet, tmp_path: Path):
    small = quantized(model)
    export(small, tmp_path / "once", provenance={})
    loaded = load_model(ModelSource(str(tmp_path / "once")))
    assert torch.equal(logits(loaded, windows), logits(small.handle, windows))
    assert (loaded.parameters, loaded.bytes) == (small.handle.parameters, small.handle.bytes)
    assert_cache_changes_nothing(loaded.module)
    loaded.module.save_pretrained(tmp_path / "twice")
    loaded.tokenizer.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load_model(ModelSource(str(tmp_path / "twice"))), windows), logits(loaded, windows))


def test_what_has_no_factors_or_small_ones_already_is_refused(llama: ModelHandle, model: CompressedModel):
    with pytest.raises(ConfigError, match=r"this model has none\. Compress it first"):
        quantized_handle(llama)
    with pytest.raises(ConfigError, match="in 8 bits already"):
        quantized_handle(quantized_handle(model.handle))

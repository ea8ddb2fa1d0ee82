"""Factors in 8 and 4 bits: what rounding may cost, what is counted, and that a folder gives the same back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_cache_changes_nothing
from torch import nn

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.compression.build import CompressedModel, compress
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.gptq import gptq
from lowrank_core.compression.quantization import grids_of, quantized
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.decomposition.units import units_of
from lowrank_core.errors import ConfigError, ModelError, NumericalError
from lowrank_core.export import export
from lowrank_core.files.grids import GRIDS, Grid
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.quantized import QuantizedMatrix, applied, matrix_of, quantized_as, scaled, scales_of
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.handle import weight_of
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.studio.overview.headers import read_checkpoint
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


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return GRIDS[request.param]


def small_of(model: CompressedModel, grid: Grid) -> CompressedModel:
    return quantized(model, grids_of(model.handle, grid.name, "none"))


def steps_of(small: QuantizedMatrix) -> torch.Tensor:
    """Return the size of a step at each number (rows, columns)."""
    scales = small.scales.abs()
    return scales[..., None] if small.grid.group == 0 else scales.repeat_interleave(small.grid.group, -1)[..., : small.columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_within_half_a_step(dtype: torch.dtype, grid: Grid):
    """In 4 bits the grid ends half a step early on one side: there, within one step."""
    matrix = torch.randn(3, 7, 131, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 7)[None, :, None]
    small = quantized_as(matrix, grid, dtype)
    off = (small.dense - matrix).abs() / steps_of(small)
    inside = small.whole < grid.range[1]
    assert float(off[inside].max()) <= 0.5001
    assert float(off.max()) <= (0.5001 if grid.bits == 8 else 1.03)
    assert small.whole.min() >= grid.range[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_cast_changes_what_4_bits_stand_for(dtype: torch.dtype):
    """Next to it: numbers near zero, whose scales are subnormal in float16, and large ones."""
    matrix = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 9)[:, None]
    small = quantized_as(matrix, GRIDS["int4"], torch.float32)
    before = small.scales.clone()
    assert torch.equal(small.to(dtype).scales.float(), before)
    assert small.state_dict()["scales"].dtype == torch.float16
    assert torch.equal(small.state_dict()["scales"].float(), before)


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 128, 129])
def test_packing_round_trips_bit_for_bit(columns: int, grid: Grid):
    low, high = grid.range
    whole = torch.randint(low, high + 1, (5, columns), generator=torch.Generator().manual_seed(columns))
    small = matrix_of(whole, torch.ones(5, grid.scales(columns)), grid)
    assert torch.equal(small.whole.long(), whole)
    assert small.values.element_size() == 1
    assert small.values.shape == (5, columns if grid.bits == 8 else (columns + 1) // 2)
    assert small.numbers == 5 * columns + small.scales.numel()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in small.state_dict().values())
    assert small.bytes(4) == stored == grid.bytes(5, columns, 4)


def test_zeros_and_what_is_whole_already_are_exact(grid: Grid):
    largest = float(grid.range[0])
    matrix = torch.tensor([[0.0, 0.0], [largest, -3.0], [-2 * largest, 2.0]])
    assert torch.equal(quantized_as(matrix, grid, torch.float32).dense, matrix)


def test_a_matrix_without_numbers_has_none(grid: Grid):
    assert quantized_as(torch.zeros(0, 5), grid, torch.float32).dense.shape == (0, 5)
    assert quantized_as(torch.zeros(3, 0), grid, torch.float32).dense.shape == (3, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_has_no_place_on_a_grid_is_refused(value: float, grid: Grid):
    with pytest.raises(NumericalError, match="NaN or Inf"):
        quantized_as(torch.tensor([[1.0, value]]), grid, torch.float32)
    if grid.bits == 4:
        with pytest.raises(NumericalError, match="too large for int4"):
            quantized_as(torch.tensor([[1.0, 1e7]]), grid, torch.float32)


def test_it_multiplies_as_the_matrix_that_it_stands_for(grid: Grid):
    generator = torch.Generator().manual_seed(1)
    matrix, x, bias = torch.randn(6, 5, generator=generator), torch.randn(2, 3, 5, generator=generator), torch.randn(6, generator=generator)
    small = quantized_as(matrix, grid, torch.float32)
    assert torch.allclose(applied(small, x, bias), nn.functional.linear(x, small.dense, bias), atol=1e-6)
    assert torch.allclose(applied(nn.Parameter(matrix), x, bias), nn.functional.linear(x, matrix, bias))


def test_layers_compute_what_their_rounded_weights_say(model: CompressedModel, grid: Grid):
    handle = small_of(model, grid).handle
    for name, layer in layers(handle).items():
        assert layer.grid == grid, name
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(2))
        bias = layer.bias if isinstance(layer.bias, torch.Tensor) else None
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, bias), atol=1e-4), name
        exact = layers(model.handle)[name].weight
        assert float((layer.weight - exact).norm() / exact.norm()) < (0.05 if grid.bits == 8 else 0.5), name


def test_the_given_model_stays_and_the_outputs_are_close(model: CompressedModel, windows: WindowSet):
    before = logits(model.handle, windows)
    changes = [float((logits(small_of(model, grid).handle, windows) - before).norm() / before.norm()) for grid in GRIDS.values()]
    assert torch.equal(logits(model.handle, windows), before)
    assert 0 < changes[0] < 0.05
    assert changes[0] < changes[1] < 0.6


def test_counts_are_those_of_the_written_file(model: CompressedModel, tmp_path: Path, grid: Grid):
    small = small_of(model, grid)
    assert small.report.quantization == grid.name
    assert small.report.bytes_after == small.handle.bytes < model.report.bytes_after
    scales = sum(child.scales.numel() for child in small.handle.module.modules() if isinstance(child, QuantizedMatrix))
    assert small.report.parameters_after == model.report.parameters_after + scales
    assert small.report.linear_parameters_after == model.report.linear_parameters_after + scales
    export(small, tmp_path / "out", provenance={})
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert small.handle.bytes <= stored < small.handle.bytes + 20_000  # the header
    saved = sum(unit.bytes for unit in model.report.units) - sum(unit.bytes for unit in small.report.units)
    assert saved == model.report.bytes_after - small.report.bytes_after


def test_a_folder_gives_back_the_same_model(model: CompressedModel, windows: WindowSet, tmp_path: Path, grid: Grid):
    small = small_of(model, grid)
    export(small, tmp_path / "once", provenance={})
    loaded = load_model(ModelSource(str(tmp_path / "once")))
    assert torch.equal(logits(loaded, windows), logits(small.handle, windows))
    assert (loaded.parameters, loaded.bytes) == (small.handle.parameters, small.handle.bytes)
    assert_cache_changes_nothing(loaded.module)
    loaded.module.save_pretrained(tmp_path / "twice")
    loaded.tokenizer.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load_model(ModelSource(str(tmp_path / "twice"))), windows), logits(loaded, windows))


def test_headers_alone_tell_how_many_numbers_a_folder_holds(model: CompressedModel, tmp_path: Path, grid: Grid):
    small = quantized(model, grids_of(model.handle, grid.name, grid.name))
    export(small, tmp_path / "out", provenance={})
    read = read_checkpoint(tmp_path / "out")
    assert sum(tensor.elements for tensor in read.tensors) == small.handle.parameters
    assert sum(tensor.bytes for tensor in read.tensors) == small.handle.bytes


def test_what_has_no_factors_or_small_ones_already_is_refused(llama: ModelHandle, model: CompressedModel, grid: Grid):
    with pytest.raises(ConfigError, match=r"this model has none\. Compress it first"):
        grids_of(llama, grid.name, "none")
    with pytest.raises(ConfigError, match="quantised already"):
        grids_of(small_of(model, grid).handle, grid.name, "none")


def correlated(width: int, seed: int = 3) -> torch.Tensor:
    """Return a second moment (width, width) of inputs that depend on each other."""
    mixed = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mixed @ torch.diag(torch.logspace(0, -3, width, dtype=torch.float64)) @ mixed.T


def output_error(matrix: torch.Tensor, small: QuantizedMatrix, moment: torch.Tensor) -> torch.Tensor:
    off = matrix.double() - small.dense_in(torch.float64)
    return ((off @ moment) * off).sum(1)


@pytest.mark.parametrize("columns", [1, 65, 130])
def test_gptq_errs_less_than_nearest_on_the_same_grid(columns: int, grid: Grid):
    matrix = torch.randn(12, columns, generator=torch.Generator().manual_seed(4))
    moment = correlated(columns)
    nearest, better = quantized_as(matrix, grid, torch.float32), gptq(matrix, moment, grid, torch.float32)
    assert torch.equal(nearest.scales, better.scales)
    errors = output_error(matrix, nearest, moment), output_error(matrix, better, moment)
    assert (errors[1] <= errors[0]).all()
    if columns > 1:
        assert float(errors[1].sum()) < 0.6 * float(errors[0].sum())


def test_gptq_of_white_inputs_is_rounding_to_nearest(grid: Grid):
    """Nothing can make up for an error then; inputs that are always zero are white to it."""
    matrix = torch.randn(5, 70, generator=torch.Generator().manual_seed(5))
    for moment in (torch.eye(70, dtype=torch.float64), torch.zeros(70, 70, dtype=torch.float64)):
        assert torch.equal(gptq(matrix, moment, grid, torch.float32).whole, quantized_as(matrix, grid, torch.float32).whole)


def test_gptq_by_its_formula(grid: Grid):
    """Column by column with the inverse of what is left of S + δI, as in the paper's equations 2 and 3; no factor of Cholesky."""
    matrix, moment = torch.randn(4, 40, generator=torch.Generator().manual_seed(6), dtype=torch.float64), correlated(40)
    steps = scaled(torch.ones_like(matrix), scales_of(matrix, grid, torch.float32), grid)
    left, whole = matrix.clone(), torch.empty_like(matrix)
    columns = moment.diagonal().argsort(descending=True, stable=True).tolist()
    damped = moment + torch.eye(40, dtype=torch.float64) * 0.01 * moment.diagonal().mean()
    while columns:
        inverse = torch.linalg.inv(damped[columns][:, columns])
        column = columns[0]
        whole[:, column] = (left[:, column] / steps[:, column]).round().clamp(*grid.range)
        off = (left[:, column] - steps[:, column] * whole[:, column]) / inverse[0, 0]
        left[:, columns] -= off[:, None] * inverse[0]
        columns = columns[1:]
    better = gptq(matrix, moment, grid, torch.float32).whole
    nearest = quantized_as(matrix, grid, torch.float32).whole
    assert (
        torch.tensor([torch.equal(row, other) for row, other in zip(better.double(), whole, strict=True)]) | (better == nearest).all(1)
    ).all()
    assert not torch.equal(better, nearest)


def test_gptq_refuses_what_is_not_finite(grid: Grid):
    with pytest.raises(NumericalError, match="second moment of its inputs holds NaN"):
        gptq(torch.ones(2, 3), torch.full((3, 3), torch.nan), grid, torch.float32)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        gptq(torch.full((2, 3), torch.nan), torch.eye(3), grid, torch.float32)


@pytest.fixture(scope="module")
def moments(llama: ModelHandle, windows: WindowSet) -> Callable[[str], torch.Tensor]:
    statistics = collect_statistics(llama, windows, CalibrationConfig(group_size=8))
    return lambda name: statistics.inputs[next(each.input_group for each in llama.layers if each.name == name)].second_moment


def dense_of(handle: ModelHandle, name: str, moments: Callable[[str], torch.Tensor] | None = None) -> CompressedModel:
    dense = compress(handle, {}, allocation_from_ranks("dense", units_of(handle, CompressionConfig()), {}))
    return quantized(dense, grids_of(dense.handle, "none", name), moments=moments)


@pytest.mark.parametrize("checkpoint", ["llama_checkpoint", "gpt2_checkpoint"])
def test_a_dense_model_is_quantised_and_read_again(checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path, grid: Grid):
    """GPT-2 stores its matrices transposed, and with biases."""
    handle = load_model(ModelSource(str(request.getfixturevalue(checkpoint))))
    small = dense_of(handle, grid.name)
    assert {layer.form for layer in layers(small.handle).values()} == {"dense"}
    assert set(layers(small.handle)) == {layer.name for layer in handle.layers} == set(small.report.grids)
    assert not small.handle.layers
    assert small.report.quantization == f"dense layers {grid.name}"
    manifest = export(small, tmp_path / "out", provenance={})
    loaded = load_model(ModelSource(str(tmp_path / "out")))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=ids).logits, small.handle.module(input_ids=ids).logits)
    assert loaded.bytes == small.report.bytes_after <= manifest.written_bytes < loaded.bytes + 20_000
    assert "Linear layers are quantised." in (tmp_path / "out" / "README.md").read_text()


def test_gptq_of_dense_layers_is_closer_in_the_output(llama: ModelHandle, moments: Callable[[str], torch.Tensor]):
    nearest, better = dense_of(llama, "int4"), dense_of(llama, "int4", moments)
    assert nearest.report == better.report
    for layer in llama.layers:
        weight, moment = weight_of(llama.module.get_submodule(layer.name)).double(), moments(layer.name)
        errors = []
        for small in (nearest, better):
            off = weight - layers(small.handle)[layer.name].weight.double()
            errors.append(float(((off @ moment) * off).sum()))
        assert errors[1] <= errors[0], layer.name


def test_factors_and_dense_layers_may_have_different_grids(model: CompressedModel, windows: WindowSet, tmp_path: Path):
    small = quantized(model, grids_of(model.handle, "int8", "int4"))
    forms = {layer.form: layer.grid.name for layer in layers(small.handle).values() if layer.grid is not None}
    assert forms.pop("dense", "int4") == "int4"
    assert set(forms.values()) == {"int8"}
    export(small, tmp_path / "out", provenance={})
    assert torch.equal(logits(load_model(ModelSource(str(tmp_path / "out"))), windows), logits(small.handle, windows))


def test_gptq_of_factors_is_closer_than_nearest(model: CompressedModel, moments: Callable[[str], torch.Tensor]):
    """Of all layers whose inputs are known, summed: of a single one it may be further."""
    grids = grids_of(model.handle, "int4", "none")
    totals = [0.0, 0.0]
    for index, known in enumerate((None, moments)):
        small = quantized(model, grids, moments=known)
        for name, layer in layers(small.handle).items():
            off, moment = (layer.weight - layers(model.handle)[name].weight).double(), moments(name)
            totals[index] += float(((off @ moment) * off).sum())
    assert totals[1] < totals[0]


def test_a_dense_grid_that_is_not_there_is_refused(llama_checkpoint: Path, tmp_path: Path):
    small = dense_of(load_model(ModelSource(str(llama_checkpoint))), "int4")
    export(small, tmp_path / "out", provenance={})
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    name = next(iter(config["quantization_config"]["layers"]))
    del config["quantization_config"]["layers"][name]["int4"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no valid grid"):
        load_model(ModelSource(str(tmp_path / "out")))

"""MoDeGPT: its three algorithms against ten lines of numpy each; modules are verified by behaviour; a preset like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_cache_changes_nothing
from families import load_family
from torch import Tensor, nn

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.cli import main
from lowrank_core.commands import serve
from lowrank_core.compression.build import CompressedModel, compress
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ExportConfig, ModelSource
from lowrank_core.config.serving import ServeConfig
from lowrank_core.decomposition.head_factorization import HeadBasis
from lowrank_core.decomposition.module_reduction import RIDGE, PairBasis, WidthBasis
from lowrank_core.decomposition.store import cached_bases
from lowrank_core.errors import ConfigError, ModelError, RankError
from lowrank_core.export import export
from lowrank_core.export.dense import merged
from lowrank_core.layers.base import CompressedModule, PivotIndex
from lowrank_core.layers.channels import KeptPairs, NarrowInput, NarrowOutput
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.attention import find_heads
from lowrank_core.models.handle import describe, random_tokens, weight_of
from lowrank_core.models.modules import find_modules
from lowrank_core.parameters import HeadUnit, PairUnit, Unit, WidthUnit, budget_for_ratio
from lowrank_core.presets.recipes import PRESETS
from lowrank_core.statistics.calibration import cached_statistics, collect_statistics
from lowrank_core.studio.shared.model_facts import _facts
from lowrank_core.text import WindowSet

MODEGPT = PRESETS["modegpt"]
CALIBRATION = CalibrationConfig(group_size=8)


def logits(handle: ModelHandle) -> Tensor:
    with torch.no_grad():
        result: Tensor = handle.module(input_ids=random_tokens(handle.module, 2, seed=5), use_cache=False).logits
    return result


@pytest.fixture(scope="module")
def reduced(any_handle: ModelHandle, windows: WindowSet) -> Decomposed:
    return decompose(any_handle, collect_statistics(any_handle, windows, CALIBRATION), MODEGPT.compression)


def parts(reduced: Decomposed, kind: type[Unit]) -> list[Unit]:
    return [unit for unit in reduced.units if isinstance(unit, kind)]


def numbers(reduced: Decomposed, unit: Unit) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Return W, b, E[x xᵀ] and E[x] of each member."""
    result = []
    for member in unit.members:
        module, inputs = reduced.handle.module.get_submodule(member.name), reduced.statistics.inputs[member.input_group]
        bias = module.bias if module.bias is not None else torch.zeros(member.d_out)
        tensors = weight_of(module), bias, inputs.second_moment, inputs.mean
        result.append(tuple(tensor.detach().double().numpy() for tensor in tensors))
    return result


# --- fidelity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [5, 37])
def test_mlps_are_the_nystrom_approximation_of_algorithm_1(kept: int, reduced: Decomposed):
    for unit in parts(reduced, WidthUnit):
        *firsts, (down, _, moment, _) = numbers(reduced, unit)
        scale = np.trace(moment) / len(moment)
        leverage = np.diag(moment @ np.linalg.inv(moment + RIDGE * scale * np.eye(len(moment))))
        chosen = np.sort(np.argsort(-leverage)[:kept])
        damped = moment + 1e-6 * scale * np.eye(len(moment))
        expected = down @ damped[:, chosen] @ np.linalg.inv(damped[np.ix_(chosen, chosen)])
        rest = damped - damped[:, chosen] @ np.linalg.inv(damped[np.ix_(chosen, chosen)]) @ damped[chosen]
        factors = reduced.bases[unit.name].slice(kept)
        np.testing.assert_allclose(factors.last[0].numpy(), expected, rtol=1e-6, atol=1e-8)
        for (weight, bias, _, _), (rows, biases) in zip(firsts, factors.firsts, strict=True):
            np.testing.assert_array_equal(rows.numpy(), weight[chosen])
            np.testing.assert_array_equal(0 if biases is None else biases.numpy(), 0 if biases is None else bias[chosen])
        error = float(reduced.bases[unit.name].errors[kept])
        assert error == pytest.approx(np.trace(down @ rest @ down.T), rel=1e-6)


@pytest.mark.parametrize("kept", [1, 3])
def test_queries_and_keys_keep_the_largest_scores_of_algorithm_2(kept: int, reduced: Decomposed):
    for unit in parts(reduced, PairUnit):
        energies = []
        for weight, bias, moment, mean in numbers(reduced, unit):
            squares = np.einsum("ij,jk,ik->i", weight, moment, weight) + 2 * bias * (weight @ mean) + bias**2
            energies.append(squares.reshape(-1, unit.size, unit.head_dim // unit.size))  # rotary halves, or single dimensions
        query, key = energies
        for group in range(unit.groups):
            heads = range(group * unit.heads // unit.groups, (group + 1) * unit.heads // unit.groups)
            scores = sum(query[head, part] * key[group, part] for head in heads for part in range(unit.size))
            assert reduced.bases[unit.name].slice(kept).kept[group].tolist() == sorted(np.argsort(-scores)[:kept])


@pytest.mark.parametrize("kept", [2, 6])
def test_values_and_outputs_are_the_svd_of_algorithm_3(kept: int, reduced: Decomposed):
    for unit in parts(reduced, HeadUnit):
        (value, _, moment, _), (output, _, _, _) = numbers(reduced, unit)
        lam, vectors = np.linalg.eigh(moment)
        root = vectors * np.sqrt(np.maximum(lam, 0)) @ vectors.T
        factors = reduced.bases[unit.name].slice(kept)
        per_group, dim = unit.heads // unit.groups, unit.head_dim
        for head in range(unit.heads):
            group = head // per_group
            left, sigma, right = np.linalg.svd(root @ value[group * dim : (group + 1) * dim].T, full_matrices=False)
            behind = sigma[:, None] * right @ output[:, head * dim : (head + 1) * dim].T
            turn = np.eye(dim) if per_group > 1 else np.linalg.svd(behind)[0]
            expected = left @ turn[:, :kept] @ turn[:, :kept].T @ behind  # S^½ V' O'
            ours = root @ (factors.outputs[head] @ factors.values[group]).numpy().T
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_recipe_is_that_of_the_paper():
    assert MODEGPT.compression == CompressionConfig(basis="whitened", value_dense=False, modules=True)
    assert MODEGPT.allocation == "block_influence"  # tests/unit/test_allocators.py holds its formula
    assert "No code of the authors was at hand" in MODEGPT.differs


# --- modules of models -----------------------------------------------------------------------------------------------


def test_modules_are_seen_in_every_block(any_handle: ModelHandle):
    result = find_modules(any_handle)
    assert result.dropped == ()
    assert sorted(m.name for unit in result.units for m in unit.members) == sorted(shape.name for shape in any_handle.shapes)
    plain = any_handle.module.config.model_type == "gpt2"
    assert {unit.pair for unit in result.units if isinstance(unit, PairUnit)} == {"none" if plain else "halves"}
    assert {len(unit.members) for unit in result.units if isinstance(unit, WidthUnit)} == {2 if plain else 3}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in any_handle.module.modules())


@pytest.mark.parametrize(("name", "pair"), [("gptj", "neighbours"), ("opt", "none"), ("qwen3", None), ("phi", None), ("mixtral", "halves")])
def test_rotary_pairs_are_tried_not_guessed(name: str, pair: str | None, tmp_path: Path, sample_text: str):
    result = find_modules(load_family(tmp_path, sample_text, name))
    assert {unit.pair for unit in result.units if isinstance(unit, PairUnit)} == ({pair} if pair else set())
    assert len(result.dropped) == (0 if pair else 2)
    assert all("stay dense: their dimensions can't be scaled against each other" in words for words in result.dropped)
    assert any(isinstance(unit, WidthUnit) for unit in result.units) == (name != "mixtral")


def test_what_is_in_no_module_stays_dense_and_is_said(tmp_path: Path, sample_text: str, windows: WindowSet):
    handle = load_family(tmp_path, sample_text, "qwen3")
    result = decompose(handle, collect_statistics(handle, windows, CALIBRATION), MODEGPT.compression)
    assert all(name.endswith(("q_proj", "k_proj")) for name in result.keep_dense)
    (warning,) = result.warnings(MODEGPT.allocation)
    assert warning.startswith("4 matrices are in no module that can be reduced, and stay dense")
    model = result.compress(result.allocate(MODEGPT.allocation, 0.2), windows)
    assert model.report.compression_ratio == pytest.approx(0.2, abs=0.01)


def test_a_model_without_modules_is_refused_in_one_line(tmp_path: Path, sample_text: str, windows: WindowSet):
    handle = load_family(tmp_path, sample_text, "mamba")
    with pytest.raises(ConfigError, match="no MLP and no attention of separate projections that could be reduced as modules"):
        decompose(handle, collect_statistics(handle, windows, CALIBRATION), MODEGPT.compression)


@pytest.mark.parametrize("change", [{"basis": "two_sided"}, {"storage": "pivoted"}, {"heads": True}, {"stacks": True}])
def test_modules_go_with_nothing_that_would_be_ignored(change: dict[str, object]):
    with pytest.raises(ConfigError, match="--modules has forms of its own"):
        replace(MODEGPT.compression, **change)


def test_a_run_tells_its_pages_the_units(any_handle: ModelHandle, reduced: Decomposed):
    heads = find_heads(any_handle)
    body = {**describe(any_handle), **heads.describe(), **find_modules(any_handle, heads).describe()}
    assert _facts(json.loads(json.dumps(body))).units(MODEGPT.compression) == reduced.units


# --- models ----------------------------------------------------------------------------------------------------------


def cut(reduced: Decomposed, share: float) -> CompressedModel:
    ranks = {unit.name: max(1, int(share * unit.max_rank)) for unit in reduced.units}
    return compress(reduced.handle, reduced.bases, allocation_from_ranks("manual", reduced.units, ranks))


def test_all_channels_give_the_dense_model_and_fewer_come_closer(reduced: Decomposed):
    dense = logits(reduced.handle)
    gaps = []
    for share in (0.3, 0.6, 0.9, 1.0):
        ranks = {unit.name: max(1, int(share * unit.max_rank)) for unit in reduced.units}
        with reduced.swapped(ranks):
            gaps.append(float((logits(reduced.handle) - dense).square().mean() / dense.var()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6 < gaps[-2]


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_is_counted_is_what_is_stored(share: float, reduced: Decomposed):
    model = cut(reduced, share)
    for unit in reduced.units:
        layers = [model.handle.module.get_submodule(member.name) for member in unit.members]
        assert all(isinstance(layer, CompressedModule) for layer in layers)
        floats = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        indices = sum(layer.pivots.numel() for layer in layers if isinstance(layer, PivotIndex))
        rank = model.report.ranks[unit.name]
        assert floats + indices == unit.parameters(rank)
        assert floats == sum(rows * columns for rows, columns in unit.matrices(rank)) + biases_of(layers)
    assert model.report.linear_parameters_after == sum(unit.parameters(model.report.ranks[unit.name]) for unit in reduced.units)


def biases_of(layers: list[nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers for name, parameter in layer.named_parameters() if "bias" in name)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_budget_is_met(ratio: float, reduced: Decomposed):
    allocation = reduced.allocate(MODEGPT.allocation, ratio)
    budget = budget_for_ratio(reduced.units, ratio)
    assert allocation.parameters <= budget
    assert allocation.parameters > budget - min(unit.parameters(2) - unit.parameters(1) for unit in reduced.units)


def test_a_dense_merge_computes_the_same(reduced: Decomposed):
    model = cut(reduced, 0.5)
    dense, _ = merged(model.handle.module)
    assert not any(isinstance(module, CompressedModule) for module in dense.modules())
    torch.testing.assert_close(logits(replace(model.handle, module=dense)), logits(model.handle), rtol=1e-4, atol=1e-4)


def test_an_export_reloads_bit_for_bit(reduced: Decomposed, tmp_path: Path):
    model = cut(reduced, 0.5)
    export(model, tmp_path / "out")
    assert_cache_changes_nothing(model.handle.module)
    again = load_model(ModelSource(str(tmp_path / "out")))
    torch.testing.assert_close(logits(again), logits(model.handle), rtol=0, atol=0)
    assert (again.linear_parameters, again.bytes) == (model.report.linear_parameters_after, model.report.bytes_after)
    kinds = {type(module) for module in again.module.modules() if isinstance(module, CompressedModule)}
    assert {KeptPairs, NarrowInput, NarrowOutput} <= kinds
    with pytest.raises(ModelError, match=r"^plain: .* dense"):
        export(model, tmp_path / "plain", config=ExportConfig(form="plain"))


def test_vllm_is_not_started_for_what_it_does_not_read(reduced: Decomposed, tmp_path: Path):
    export(cut(reduced, 0.5), tmp_path / "out")
    with pytest.raises(ConfigError, match="vLLM does not read layers with fewer channels than the architecture"):
        serve._vllm_command(str(tmp_path / "out"), ModelSource(str(tmp_path / "out")), ServeConfig())


def test_damaged_entries_are_told(reduced: Decomposed, tmp_path: Path):
    export(cut(reduced, 0.5), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    entry = next(e for e in config["quantization_config"]["layers"].values() if e["form"] == "kept_pairs")
    entry["pair"] = "thirds"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no valid pair"):
        load_model(ModelSource(str(tmp_path / "out")))


def test_stored_bases_are_those_of_memory(llama: ModelHandle, windows: WindowSet, tmp_path: Path):
    statistics, _ = cached_statistics(llama, windows, CALIBRATION, tmp_path)
    reduced = decompose(llama, statistics, MODEGPT.compression)
    stored = cached_bases(llama, statistics, reduced.units, MODEGPT.compression, tmp_path)
    assert {type(basis) for basis in stored.values()} == {WidthBasis, PairBasis, HeadBasis}
    for name, basis in reduced.bases.items():
        torch.testing.assert_close(stored[name].errors, basis.errors)
        one, other = stored[name].slice(2), basis.slice(2)
        if isinstance(one, type(reduced.bases[name].slice(1))) and hasattr(one, "kept"):
            assert torch.equal(one.kept, other.kept)
    with pytest.raises(RankError, match=r"rank must be in \[1, "):
        stored[reduced.units[0].name].slice(1000)


def test_the_command_line_has_the_preset(llama_checkpoint: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cut = ["--context", "32", "--windows", "8", "--validation-windows", "4", "--test-windows", "4", "--group-size", "4", "--json"]
    text = ["--text", f"file:{text_file}", *cut]
    out = str(tmp_path / "out")
    given = ["compress", "--model", str(llama_checkpoint), *text, "--compression-ratio", "0.4", "--preset", "modegpt"]
    assert main([*given, "--out", out]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["preset"], result["allocation"], result["basis"]) == ("modegpt", "block_influence", "whitened")
    assert any(name.endswith("up_proj+model.layers.1.mlp.down_proj") for name in result["ranks"])
    assert main(["evaluate", "--model", out, *text[:-3], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1

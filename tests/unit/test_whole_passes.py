"""Models whose blocks are no chain are run by whole passes: slower, and the same numbers."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from families import built
from torch import Tensor

from lowrank_core.allocation import allocate
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.truncations import measured_perplexities
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.errors import Cancelled
from lowrank_core.models import ModelHandle
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.handle import find_layers
from lowrank_core.statistics.calibration import LayerStatistics, cached_statistics, collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.text import WindowSet

CONFIG = CalibrationConfig(group_size=8, batch_size=5)
DRIFT_AWARE = CompressionConfig(basis="drift_aware", value_dense=False)
NOTE = "calibrated by whole passes, not block by block: the test says so"


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no model is taken for a chain of blocks."""
    monkeypatch.setattr(BlockRunner, "_try_chain", lambda self: "the test says so")


def assert_same(one: LayerStatistics, other: LayerStatistics) -> None:
    assert list(one.inputs) == list(other.inputs)
    for name, inputs in one.inputs.items():
        for field in fields(inputs):
            mine, theirs = getattr(inputs, field.name), getattr(other.inputs[name], field.name)
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs)), (name, field.name)
    assert one.influence == other.influence


@pytest.mark.parametrize("free", [None, 0])
def test_the_moments_are_those_of_the_chain(
    any_handle: ModelHandle, windows: WindowSet, free: int | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """However many blocks a pass measures: one of each where memory holds no more."""
    chained = collect_statistics(any_handle, windows, CONFIG)
    request.getfixturevalue("whole")
    if free is not None:
        monkeypatch.setattr("lowrank_core.statistics.calibration.free_memory", lambda device: free)
    steps: list[tuple[int, int]] = []
    result = collect_statistics(any_handle, windows, CONFIG, progress=lambda done, total: steps.append((done, total)))
    assert_same(result, chained)
    assert steps[-1] == (16, 16)
    assert len(steps) == (8 if free is None else 16)
    assert result.warnings()[0] == NOTE
    assert NOTE not in chained.warnings()


def test_nothing_but_moments_and_the_note_is_stored(
    llama: ModelHandle, windows: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    chained = collect_statistics(llama, windows, CONFIG)
    request.getfixturevalue("whole")
    monkeypatch.setattr("lowrank_core.statistics.calibration.free_memory", lambda device: 0)

    def stop(done: int, total: int) -> None:
        assert not list(tmp_path.glob("*/hidden-*"))
        if done == 12:
            raise Cancelled

    with pytest.raises(Cancelled):
        cached_statistics(llama, windows, CONFIG, tmp_path, progress=stop)
    steps: list[int] = []
    result, _ = cached_statistics(llama, windows, CONFIG, tmp_path, progress=lambda done, total: steps.append(done))
    assert steps[0] == 9  # the first block was stored
    assert_same(result, chained)
    assert result.notes == (NOTE,)


def factors(handle: ModelHandle, windows: WindowSet) -> dict[str, Tensor]:
    decomposed = decompose(handle, collect_statistics(handle, windows, CONFIG), DRIFT_AWARE)
    allocation = allocate("uniform", decomposed.units, 0.5)
    return dict(decomposed.compress(allocation, windows).handle.module.state_dict())


def test_a_sequential_fit_gives_the_factors_of_the_chain(llama: ModelHandle, windows: WindowSet, request: pytest.FixtureRequest):
    chained = factors(llama, windows)
    request.getfixturevalue("whole")
    result = factors(llama, windows)
    assert list(result) == list(chained)
    assert all(torch.equal(result[name], chained[name]) for name in chained)


def test_matrices_cut_alone_give_the_perplexities_of_the_chain(
    llama: ModelHandle, windows: WindowSet, tmp_path: Path, request: pytest.FixtureRequest
):
    few = replace(windows, ids=windows.ids[:8])
    decomposed = decompose(llama, collect_statistics(llama, few, CONFIG), CompressionConfig(basis="whitened", stacks=False, heads=False))
    chained = measured_perplexities(decomposed, few, tmp_path / "chained")
    request.getfixturevalue("whole")
    assert measured_perplexities(decomposed, few, tmp_path / "whole") == chained


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_a_family_that_shares_keys_and_values_is_compressed(name: str, llama: ModelHandle, windows: WindowSet):
    module = built(name)
    handle = replace(llama, module=module, layers=find_layers(module))
    few = replace(windows, ids=windows.ids[:8])
    statistics = collect_statistics(handle, few, CONFIG)
    assert "calibrated by whole passes" in statistics.warnings()[0]
    assert len(statistics.influence) == 4
    assert set(statistics.inputs) == {layer.input_group for layer in handle.layers}
    weighed = statistics.with_outputs(collect_gradients(handle, few, CONFIG))
    decomposed = decompose(handle, weighed, replace(DRIFT_AWARE, basis="drift_aware:two_sided"))
    result = decomposed.compress(allocate("uniform", decomposed.units, 0.3), few)
    assert torch.isfinite(result.handle.module(input_ids=few.ids[:2], use_cache=False).logits).all()


def test_latent_attention_is_calibrated_in_the_order_of_its_windows(llama: ModelHandle, windows: WindowSet):
    """``kv_b_proj`` reads (windows, 1, tokens, n)."""
    module = built("deepseek_v3")
    handle = replace(llama, module=module, layers=find_layers(module))
    seen: list[Tensor] = []
    name = "model.layers.0.self_attn.kv_b_proj"
    hook = module.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        module(input_ids=windows.ids, use_cache=False)
    hook.remove()
    result = collect_statistics(handle, windows, CONFIG).inputs[name]
    rows = seen[0].double().reshape(5, 8 * 16, -1)  # groups of 8 windows
    assert result.count == windows.ids.numel()
    torch.testing.assert_close(result.sample, torch.cov(rows.flatten(0, 1).T), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result.group_traces, torch.stack([torch.cov(group.T).trace() for group in rows]), rtol=1e-4, atol=1e-6)


def test_what_runs_without_gradients_is_left_alone():
    """DeepSeek V3.2 chooses the tokens to attend to under no_grad."""
    module = built("deepseek_v32")
    assert any("indexer" in name for name, _ in module.named_parameters())
    layers = [layer.name for layer in find_layers(module)]
    assert layers
    assert not any("indexer" in name for name in layers)

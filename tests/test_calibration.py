from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_core.calibration import cached_statistics, collect_statistics, load_statistics, save_statistics, statistics_key
from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import Cancelled, NumericalError
from lowrank_core.models import ModelHandle
from lowrank_core.text import WindowSet

CONFIG = CalibrationConfig(group_size=8, batch_size=5)


def captured_inputs(handle: ModelHandle, windows: WindowSet, name: str) -> torch.Tensor:
    """Return the input rows of a layer in one plain pass: the two-pass way."""
    seen: list[torch.Tensor] = []
    hook = handle.module.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        handle.module(input_ids=windows.ids, use_cache=False)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def test_moments_are_those_of_the_layer_s_inputs(any_handle: ModelHandle, windows: WindowSet) -> None:
    statistics = collect_statistics(any_handle, windows, CONFIG)
    assert set(statistics.inputs) == {layer.input_group for layer in any_handle.layers}
    for layer in any_handle.layers:  # also those that share another's input
        rows = captured_inputs(any_handle, windows, layer.name)
        found = statistics.inputs[layer.input_group]
        assert found.count == len(rows) == windows.ids.numel()
        torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-4, atol=1e-5)  # batches of another size: float32 rounding
        torch.testing.assert_close(found.sample, torch.cov(rows.T), rtol=1e-3, atol=1e-5)


def test_the_model_is_left_as_it_was(llama: ModelHandle, windows: WindowSet) -> None:
    before = llama.fingerprint
    collect_statistics(llama, windows, CONFIG)
    assert replace(llama).fingerprint == before
    assert not any(module._forward_pre_hooks for module in llama.module.modules())


def test_hooks_are_gone_after_a_failure(llama: ModelHandle, windows: WindowSet) -> None:
    def stop(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        collect_statistics(llama, windows, CONFIG, progress=stop)
    assert not any(module._forward_pre_hooks for module in llama.module.modules())


def test_the_same_inputs_give_equal_bits(llama: ModelHandle, windows: WindowSet) -> None:
    first, second = (collect_statistics(llama, windows, CONFIG) for _ in range(2))
    for name, inputs in first.inputs.items():
        assert torch.equal(inputs.pooled, second.inputs[name].pooled)
        assert torch.equal(inputs.mean, second.inputs[name].mean)


def test_progress_counts_windows(llama: ModelHandle, windows: WindowSet) -> None:
    seen: list[tuple[int, int]] = []
    collect_statistics(llama, windows, CONFIG, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 40) for done in range(5, 41, 5)]


def test_thin_covariances_are_warned_of(llama: ModelHandle, windows: WindowSet) -> None:
    few = replace(windows, ids=windows.ids[:12])  # 192 tokens for 80 dimensions
    (warning,) = collect_statistics(llama, few, CONFIG).warnings()
    assert "fewer than 8 tokens per dimension" in warning
    assert "192 tokens for 80 dimensions" in warning
    assert not collect_statistics(llama, windows, CONFIG).warnings()  # 640 tokens


def test_statistics_survive_a_file(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    statistics = collect_statistics(llama, windows, CONFIG)
    save_statistics(tmp_path / "kept", statistics)
    found = load_statistics(tmp_path / "kept", CONFIG)
    assert found is not None
    assert found.inputs.keys() == statistics.inputs.keys()
    for name, inputs in statistics.inputs.items():
        assert torch.equal(found.inputs[name].pooled, inputs.pooled)
        assert found.inputs[name].count == inputs.count
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_damaged_cache_is_told(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    save_statistics(tmp_path / "kept", collect_statistics(llama, windows, CONFIG))
    (tmp_path / "kept" / "0.safetensors").write_bytes(b"cut")
    with pytest.raises(NumericalError, match="Delete that folder"):
        load_statistics(tmp_path / "kept", CONFIG)


def test_a_second_run_finds_the_first_one_s_statistics(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    assert cached_statistics(llama, windows, CONFIG, tmp_path)[1] is False
    assert cached_statistics(llama, windows, CONFIG, tmp_path)[1] is True
    assert cached_statistics(llama, windows, replace(CONFIG, group_size=4), tmp_path)[1] is False


def test_the_key_is_the_content(llama: ModelHandle, windows: WindowSet) -> None:
    key = statistics_key(llama, windows, CONFIG)
    assert key == statistics_key(llama, replace(windows, dataset="another name"), replace(CONFIG, batch_size=1))
    other = windows.ids.clone()
    other[0, 0] += 1
    assert key != statistics_key(llama, replace(windows, ids=other), CONFIG)
    assert key != statistics_key(llama, windows, replace(CONFIG, group_weights="dof"))

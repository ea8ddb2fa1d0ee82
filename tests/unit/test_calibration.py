import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import Cancelled, ConfigError, ModelError, NumericalError
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import blocks_of
from lowrank_core.statistics import calibration
from lowrank_core.statistics import store as statistics_store
from lowrank_core.statistics.calibration import cached_statistics, collect_statistics, load_statistics, statistics_key
from lowrank_core.statistics.moments import InputStatistics
from lowrank_core.statistics.spectra import spectra_of
from lowrank_core.statistics.store import exclusive, statistics_folder
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
        result = statistics.inputs[layer.input_group]
        assert result.count == len(rows) == windows.ids.numel()
        torch.testing.assert_close(result.mean, rows.mean(0), rtol=1e-4, atol=1e-5)  # batches of another size: float32 rounding
        torch.testing.assert_close(result.sample, torch.cov(rows.T), rtol=1e-3, atol=1e-5)


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


def test_progress_counts_blocks_and_batches(llama: ModelHandle, windows: WindowSet) -> None:
    seen: list[tuple[int, int]] = []
    collect_statistics(llama, windows, CONFIG, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 16) for done in range(1, 17)]  # 2 blocks, 8 batches


def test_thin_covariances_are_warned_of(llama: ModelHandle, windows: WindowSet) -> None:
    few = replace(windows, ids=windows.ids[:12])  # 192 tokens for 80 dimensions
    (warning,) = collect_statistics(llama, few, CONFIG).warnings()
    assert "fewer than 8 tokens per dimension" in warning
    assert "192 tokens for 80 dimensions" in warning
    assert not collect_statistics(llama, windows, CONFIG).warnings()  # 640 tokens


def equal(first: Mapping[str, InputStatistics], second: Mapping[str, InputStatistics]) -> bool:
    assert list(first) == list(second)
    return all(
        all(torch.equal(torch.as_tensor(getattr(a, f.name)), torch.as_tensor(getattr(b, f.name))) for f in fields(a))
        for a, b in ((inputs, second[name]) for name, inputs in first.items())
    )


def test_a_store_keeps_what_memory_would(any_handle: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    statistics, cached = cached_statistics(any_handle, windows, CONFIG, tmp_path)
    assert not cached
    assert equal(collect_statistics(any_handle, windows, CONFIG).inputs, statistics.inputs)
    (folder,) = tmp_path.iterdir()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names - {"lock"} == {"done.json", "checksums.json", "inputs/block-000.safetensors", "inputs/block-001.safetensors"}
    assert statistics.warnings() == collect_statistics(any_handle, windows, CONFIG).warnings()
    assert statistics.seconds > 0


def test_inputs_are_read_when_they_are_asked_for(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    statistics, _ = cached_statistics(llama, windows, CONFIG, tmp_path)
    name = next(iter(statistics.inputs))
    assert statistics.inputs[name] is not statistics.inputs[name]
    assert len(statistics.inputs) == 8
    with pytest.raises(KeyError):
        statistics.inputs["none"]
    loaded = load_statistics(statistics_folder(tmp_path, statistics_key(llama, windows, CONFIG), windows.context), CONFIG)
    assert loaded is not None
    assert equal(loaded.inputs, statistics.inputs)
    assert load_statistics(tmp_path / "nothing", CONFIG) is None


@pytest.mark.parametrize("name", ["inputs/block-001.safetensors", "done.json"])
def test_a_damaged_cache_is_told(llama: ModelHandle, windows: WindowSet, tmp_path: Path, name: str) -> None:
    cached_statistics(llama, windows, CONFIG, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / name).write_bytes(b"cut")
    with pytest.raises(NumericalError, match="Delete that folder"):
        cached_statistics(llama, windows, CONFIG, tmp_path)
    (folder / "inputs/block-001.safetensors").unlink()
    with pytest.raises(NumericalError, match="Delete that folder"):
        load_statistics(folder, CONFIG)


def test_a_second_run_finds_the_first_one_s_statistics(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    assert cached_statistics(llama, windows, CONFIG, tmp_path)[1] is False
    assert cached_statistics(llama, windows, CONFIG, tmp_path)[1] is True
    assert cached_statistics(llama, windows, replace(CONFIG, group_size=4), tmp_path)[1] is False


def stop_after(batches: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= batches:
            raise Cancelled

    return progress


@pytest.mark.parametrize("batches", [3, 8, 11, 16])
def test_an_interrupted_calibration_goes_on_with_the_same_bits(
    any_handle: ModelHandle, windows: WindowSet, tmp_path: Path, batches: int
) -> None:
    with pytest.raises(Cancelled):
        cached_statistics(any_handle, windows, CONFIG, tmp_path, progress=stop_after(batches))
    (folder,) = tmp_path.iterdir()
    assert load_statistics(folder, CONFIG) is None
    finished = len(list(folder.glob("inputs/*.safetensors")))
    assert finished == (batches - 1) // 8
    seen: list[int] = []
    statistics, cached = cached_statistics(any_handle, windows, CONFIG, tmp_path, progress=lambda done, total: seen.append(done))
    assert not cached
    assert seen == list(range(finished * 8 + 1, 17))
    whole = collect_statistics(any_handle, windows, CONFIG)
    assert equal(statistics.inputs, whole.inputs)
    assert statistics.influence == whole.influence
    assert not list(folder.glob("hidden-*"))


def test_hidden_states_that_were_cut_are_told(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        cached_statistics(llama, windows, CONFIG, tmp_path, progress=stop_after(12))
    (hidden,) = tmp_path.glob("*/hidden-000.*")
    assert hidden.name == "hidden-000.float32.16x32"
    os.truncate(hidden, 100)
    with pytest.raises(NumericalError, match=r"hidden-000\.float32\.16x32 is cut short.*Delete that folder"):
        cached_statistics(llama, windows, CONFIG, tmp_path)
    hidden.unlink()
    with pytest.raises(NumericalError, match=r"hidden states after block 0 are missing.*Delete that folder"):
        cached_statistics(llama, windows, CONFIG, tmp_path)


CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from lowrank_core.statistics.calibration import cached_statistics
from lowrank_core.config import CalibrationConfig, ModelSource
from lowrank_core.models import load_model
from lowrank_core.text import WindowSet
from pathlib import Path

def progress(done, total):
    if done == {done}:
        os.kill(os.getpid(), signal.SIGKILL)

handle = load_model(ModelSource(sys.argv[1]))
ids = torch.load(sys.argv[3])
windows = WindowSet("random tokens", "calibration", ids, bos=False, available_tokens=ids.numel())
cached_statistics(handle, windows, CalibrationConfig(group_size=8, batch_size=5), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_calibration_goes_on_with_the_same_bits(
    llama: ModelHandle, llama_checkpoint: Path, windows: WindowSet, tmp_path: Path
) -> None:
    torch.save(windows.ids, tmp_path / "ids.pt")
    store = tmp_path / "store"
    command = [sys.executable, "-c", CHILD.format(done=12), str(llama_checkpoint), str(store), str(tmp_path / "ids.pt")]
    assert subprocess.run(command, check=False, capture_output=True, cwd=Path(__file__).parents[2]).returncode == -9
    assert len(list(store.glob("*/hidden-*"))) == 1
    assert len(list(store.glob("*/inputs/*"))) == 1
    statistics, cached = cached_statistics(llama, windows, CONFIG, store)
    assert not cached
    whole = collect_statistics(llama, windows, CONFIG)
    assert equal(statistics.inputs, whole.inputs)
    assert statistics.influence == whole.influence
    assert load_statistics(statistics_folder(store, statistics_key(llama, windows, CONFIG), windows.context), CONFIG) is not None
    assert cached_statistics(llama, windows, CONFIG, store)[0].influence == whole.influence


def test_two_at_once_measure_once(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    waited, results = threading.Event(), []

    def first(done: int, total: int) -> None:
        if done == 8:
            second.start()
            assert waited.wait(120)

    def wait(done: int, total: int) -> None:
        assert (done, total) == (0, 16)
        waited.set()

    second = threading.Thread(target=lambda: results.append(cached_statistics(llama, windows, CONFIG, tmp_path, progress=wait)))
    statistics, cached = cached_statistics(llama, windows, CONFIG, tmp_path, progress=first)
    second.join(120)
    assert not cached
    ((result, cached),) = results
    assert cached
    assert equal(result.inputs, statistics.inputs)


def test_waiting_for_another_can_be_cancelled(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    folder = statistics_folder(tmp_path, statistics_key(llama, windows, CONFIG), windows.context)
    with exclusive(folder, lambda: None), pytest.raises(Cancelled):
        cached_statistics(llama, windows, CONFIG, tmp_path, progress=stop_after(0))


@pytest.mark.parametrize("robust", ["trimmed", "downweighted"])
def test_robust_rules_reach_the_inputs(llama: ModelHandle, windows: WindowSet, tmp_path: Path, robust: str) -> None:
    config = replace(CONFIG, robust=robust)
    plain = collect_statistics(llama, windows, CONFIG)
    statistics, _ = cached_statistics(llama, windows, config, tmp_path)
    zeros = {robust: 2 if robust == "trimmed" else 0 for robust in ("trimmed", "downweighted")}
    for name, inputs in statistics.inputs.items():
        assert int((inputs.group_weights == 0).sum()) == zeros[robust]
        assert inputs.count == plain.inputs[name].count
    assert robust == "downweighted" or not equal(statistics.inputs, plain.inputs)


def test_too_few_groups_to_trim_are_told_before_any_work(llama: ModelHandle, windows: WindowSet) -> None:
    def never(done: int, total: int) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match="40 windows in groups of 20 make 2"):
        collect_statistics(llama, windows, CalibrationConfig(group_size=20, robust="trimmed"), progress=never)


def test_memory_is_that_of_the_largest_block(
    llama: ModelHandle, windows: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 8 * (3 * 32**2 + 80**2)  # attention, o, gate and up, down
    hidden = 4 * 40 * 16 * 32

    def free(available: int) -> None:
        monkeypatch.setattr(calibration.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    free(5 * block)
    cached_statistics(llama, windows, CONFIG, tmp_path)
    with pytest.raises(ModelError, match="needs about"):
        collect_statistics(llama, windows, CONFIG)
    free(5 * block + 2 * 2 * block + hidden)
    collect_statistics(llama, windows, CONFIG)
    free(5 * block - 1)
    with pytest.raises(ModelError, match="Use a machine with more memory"):
        cached_statistics(llama, windows, CONFIG, tmp_path / "other")
    free(7 * block - 1)
    with pytest.raises(ModelError, match="needs about"):  # two groups wait outside
        cached_statistics(llama, windows, replace(CONFIG, robust="trimmed"), tmp_path)


def test_a_full_disk_is_told(llama: ModelHandle, windows: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_store, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ModelError, match="Make room"):
        cached_statistics(llama, windows, CONFIG, tmp_path)


def test_hidden_states_of_bfloat16_survive_the_disk(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    module = type(llama.module)(llama.module.config)
    module.load_state_dict(llama.module.state_dict())
    handle = replace(llama, module=module.to(torch.bfloat16).eval().requires_grad_(False))
    with pytest.raises(Cancelled):
        cached_statistics(handle, windows, CONFIG, tmp_path, progress=stop_after(9))
    assert [path.name for path in tmp_path.glob("*/hidden-0*")] == ["hidden-000.bfloat16.16x32"]
    statistics, _ = cached_statistics(handle, windows, CONFIG, tmp_path)
    assert equal(statistics.inputs, collect_statistics(handle, windows, CONFIG).inputs)


def test_a_bad_activation_names_the_layer(llama: ModelHandle, windows: WindowSet) -> None:
    module = type(llama.module)(llama.module.config).eval().requires_grad_(False)
    module.model.layers[1].input_layernorm.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.self_attn\.q_proj: its input holds NaN or Inf"):
        collect_statistics(replace(llama, module=module), windows, CONFIG)


def block_states(handle: ModelHandle, windows: WindowSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the hidden states before and after each block in one plain pass: the two-pass way."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen.append((arguments[0].double(), (output[0] if isinstance(output, tuple) else output).double()))

    _, blocks = blocks_of(handle.module)
    hooks = [block.register_forward_hook(see) for block in blocks]
    with torch.inference_mode():
        handle.module(input_ids=windows.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_influence_of_a_block_is_how_far_it_turns_the_hidden_states(any_handle: ModelHandle, windows: WindowSet) -> None:
    result = collect_statistics(any_handle, windows, CONFIG).influence
    expected = [1 - torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in block_states(any_handle, windows)]
    assert result == pytest.approx(expected, rel=1e-5, abs=1e-7)  # batches of another size: float32 rounding
    assert all(0 < value < 2 for value in result)


def test_a_block_that_passes_on_what_it_is_given_has_no_influence(llama: ModelHandle, windows: WindowSet) -> None:
    module = type(llama.module)(llama.module.config).eval().requires_grad_(False)
    for projection in (module.model.layers[1].self_attn.o_proj, module.model.layers[1].mlp.down_proj):
        projection.weight.zero_()
    first, second = collect_statistics(replace(llama, module=module), windows, CONFIG).influence
    assert first > 0
    assert second == pytest.approx(0, abs=1e-12)


def test_blocks_that_are_not_run_have_no_influence(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    first = replace(llama, layers=tuple(layer for layer in llama.layers if layer.shape.depth == 0))
    whole = collect_statistics(llama, windows, CONFIG).influence
    assert collect_statistics(first, windows, CONFIG).influence == whole[:1]
    assert cached_statistics(first, windows, CONFIG, tmp_path)[0].influence == whole[:1]


def test_a_bad_hidden_state_names_the_block(llama: ModelHandle, windows: WindowSet) -> None:
    module = type(llama.module)(llama.module.config).eval().requires_grad_(False)
    module.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # after the last input that is looked at
    with pytest.raises(NumericalError, match=r"model\.layers\.1: its hidden states hold NaN or Inf"):
        collect_statistics(replace(llama, module=module), windows, CONFIG)


def test_fewer_tokens_than_dimensions_have_no_condition(llama: ModelHandle, windows: WindowSet) -> None:
    statistics = collect_statistics(llama, windows.first(1), CONFIG)  # 16 tokens of 32 and of 80 dimensions
    described = statistics.describe(spectra_of(llama, statistics), llama.layers)
    assert {entry["condition"] for entry in described["inputs"]} == {None}


def test_the_key_is_the_content(llama: ModelHandle, windows: WindowSet) -> None:
    key = statistics_key(llama, windows, CONFIG)
    assert key == statistics_key(llama, replace(windows, dataset="another name"), replace(CONFIG, batch_size=1))
    other = windows.ids.clone()
    other[0, 0] += 1
    assert key != statistics_key(llama, replace(windows, ids=other), CONFIG)
    assert key != statistics_key(llama, windows, replace(CONFIG, group_weights="dof"))
    assert key != statistics_key(llama, windows, replace(CONFIG, robust="trimmed"))
    assert key == statistics_key(llama, windows, replace(CONFIG, gradient_windows=3, gradient_seed=1))


def test_the_same_tokens_cut_otherwise_have_statistics_of_their_own(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> None:
    short = replace(windows, ids=windows.ids.reshape(-1, 8))
    assert short.sha256 == windows.sha256
    cached_statistics(llama, windows, CONFIG, tmp_path)
    result, cached = cached_statistics(llama, short, CONFIG, tmp_path)
    assert not cached
    fresh, group = collect_statistics(llama, short, CONFIG), llama.layers[0].input_group
    assert torch.equal(result.inputs[group].pooled, fresh.inputs[group].pooled)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="robust must be one of none, trimmed, downweighted"):
        CalibrationConfig(robust="median")

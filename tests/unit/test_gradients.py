"""Output gradients: against autograd token by token, against measured KL, and whatever the batches and passes."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupting import stopping_after
from torch import Tensor
from torch.nn import functional

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import Cancelled, ConfigError, ModelError, NumericalError
from lowrank_core.models import ModelHandle
from lowrank_core.models.blocks import BlockRunner
from lowrank_core.models.handle import weight_of
from lowrank_core.statistics import gradients
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.statistics.gradients import cached_gradients, collect_gradients, gradients_key, loss_gradient, sampled_labels
from lowrank_core.statistics.moments import OutputStatistics
from lowrank_core.text import WindowSet

CONFIG = CalibrationConfig(batch_size=5)


@pytest.fixture
def few(windows: WindowSet) -> WindowSet:
    return replace(windows, ids=windows.ids[:7])


def directly(handle: ModelHandle, ids: Tensor, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return the gradients (N, m) and inputs (N, n) of a layer, window by window, by differentiating a shift of its output."""
    layer = handle.module.get_submodule(name)
    all_gradients, inputs = [], []
    for index, window in enumerate(ids):
        shift = torch.zeros(len(window), weight_of(layer).shape[0], requires_grad=True)

        def hook(_: object, arguments: tuple[Tensor, ...], output: Tensor, shift: Tensor = shift) -> Tensor:
            inputs.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]))
            return output + shift.reshape(output.shape)

        handle_ = layer.register_forward_hook(hook)
        logits = handle.module(input_ids=window[None], use_cache=False).logits
        handle_.remove()
        labels = sampled_labels(logits.detach(), seed, index)
        losses = -logits.log_softmax(-1)[0, torch.arange(len(window)), labels[0]]
        all_gradients.append(torch.autograd.grad(losses.sum(), shift)[0])
    return torch.cat(all_gradients).double(), torch.cat(inputs).double()


def test_moments_are_those_of_the_gradients(any_handle: ModelHandle, few: WindowSet):
    result = collect_gradients(any_handle, few, replace(CONFIG, gradient_seed=4))
    assert list(result) == [layer.name for layer in any_handle.layers]
    for name, statistics in result.items():
        rows, inputs = directly(any_handle, few.ids, name, 4)
        assert statistics.count == few.ids.numel() == len(rows)
        scale = float(rows.square().mean())
        torch.testing.assert_close(statistics.gradient, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4 * scale)
        fisher = (rows.square() * inputs.square().sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close(statistics.fisher_rows, fisher, rtol=1e-3, atol=1e-4 * float(fisher.mean()))
        assert torch.equal(statistics.gradient, statistics.gradient.T)


def clipped(rows: Tensor) -> Tensor:
    """Return the gradients (T, m) of one window that count, by the formula: norms within 0.1 and 10 of their mean, eighths left out."""
    mean, ends = rows.norm(dim=1).mean(), len(rows) // 8
    lengths = [min(max(float(row.norm()), 0.1 * float(mean)), 10 * float(mean)) for row in rows]
    return torch.stack([row / row.norm() * length for row, length in zip(rows, lengths, strict=True)])[ends : len(rows) - ends]


def test_robust_moments_clip_norms_by_window_and_leave_the_ends_out(any_handle: ModelHandle, few: WindowSet):
    result = collect_gradients(any_handle, few, CONFIG, robust=True)
    for name, statistics in result.items():
        rows, inputs = directly(any_handle, few.ids, name, 0)
        kept = torch.cat([clipped(window) for window in torch.split(rows, few.context)])
        assert statistics.count == len(kept) == len(few.ids) * (few.context - 2 * (few.context // 8))
        scale = float(kept.square().mean())
        torch.testing.assert_close(statistics.gradient, kept.T @ kept / len(kept), rtol=1e-3, atol=1e-4 * scale)
        middle = inputs.reshape(len(few.ids), few.context, -1)[:, few.context // 8 : -(few.context // 8)].flatten(0, 1)
        fisher = (kept.square() * middle.square().sum(1, keepdim=True)).mean(0)
        torch.testing.assert_close(statistics.fisher_rows, fisher, rtol=1e-3, atol=1e-4 * float(fisher.mean()))


def test_a_robust_token_has_a_norm_near_its_window_s_mean():
    rows = torch.cat([torch.full((16, 4), 1.0), torch.full((16, 4), 3.0)]).double()
    rows[5], rows[6], rows[7], rows[20] = 1e6, 1e-9, 0.0, 7.0
    tokens = torch.arange(32)
    result, counted = gradients.robust_rows(rows, tokens, 16)
    assert counted.tolist() == [2 <= token % 16 < 14 for token in range(32)]
    mean = float(rows[:16].norm(dim=1).mean())
    assert float(result[3].norm()) == pytest.approx(10 * mean)
    assert float(result[4].norm()) == pytest.approx(0.1 * mean)
    assert not result[5].any(), "a gradient of zero stays one"
    torch.testing.assert_close(result[12:], rows[18:30])
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    again, _ = gradients.robust_rows(rows[shuffled], tokens[shuffled], 16)
    torch.testing.assert_close(again.T @ again, result.T @ result)


def test_robust_moments_have_a_key_of_their_own_and_the_others_keep_theirs(llama: ModelHandle, few: WindowSet):
    plain, robust = gradients_key(llama, few, CONFIG), gradients_key(llama, few, CONFIG, robust=True)
    parts = ["gradients", 2, llama.fingerprint, few.first(CONFIG.gradient_windows).sha256, CONFIG.gradient_seed]
    assert plain == hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    assert robust != plain


def kl_per_token(handle: ModelHandle, windows: WindowSet, name: str, change: Tensor) -> float:
    """Return KL(dense ‖ changed) in nats per token after adding ``change`` to a layer's weight, which is put back."""
    weight = weight_of(handle.module.get_submodule(name))
    with torch.no_grad():
        dense = handle.module(input_ids=windows.ids, use_cache=False).logits.double().log_softmax(-1)
        kept = weight.clone()
        weight += change
        changed = handle.module(input_ids=windows.ids, use_cache=False).logits.double().log_softmax(-1)
        weight.copy_(kept)
    return float(functional.kl_div(changed, dense, log_target=True, reduction="sum")) / windows.ids.numel()


@pytest.mark.parametrize("kind", [-3, -2, -1])
def test_the_two_sides_predict_the_divergence_of_a_small_change(any_handle: ModelHandle, windows: WindowSet, kind: int):
    """Of layers behind the last attention; ahead of one, changes of many tokens add up in each output, and the product misses that."""
    layers = [layer for layer in any_handle.layers if layer.shape.depth == 1]
    layer = layers[kind]
    outputs = collect_gradients(any_handle, windows, CONFIG)[layer.name]
    inputs = collect_statistics(any_handle, windows, CONFIG).inputs[layer.input_group]
    weight = weight_of(any_handle.module.get_submodule(layer.name))
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.01 * float(weight.std())
    delta = change.double()
    predicted = 0.5 * float(torch.trace(outputs.gradient @ delta @ inputs.second_moment @ delta.T))
    measured = kl_per_token(any_handle, windows, layer.name, change)
    assert 0.5 < predicted / measured < 2


def test_labels_follow_the_model_s_distribution():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).expand(50, 400, 4)
    labels = sampled_labels(logits, 0, 0)
    shares = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    torch.testing.assert_close(shares, logits[0, 0].softmax(0), atol=0.01, rtol=0)
    assert shares[2] == 0


def test_labels_of_many_classes_are_those_of_one_sum_over_all():
    logits = 3 * torch.randn(2, 300, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.stack([gradients._uniform(5, 4 + window, 300) for window in range(2)])[..., None]
    expected = torch.searchsorted(logits.softmax(-1).cumsum(-1), draws, right=True)[..., 0]
    assert torch.equal(sampled_labels(logits, 5, 4), expected)


def test_the_gradient_of_the_loss_is_that_of_the_cross_entropy():
    logits = torch.randn(2, 30, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    functional.cross_entropy(logits.flatten(0, 1), sampled_labels(logits, 0, 0).flatten(), reduction="sum").backward()
    torch.testing.assert_close(loss_gradient(logits, 0, 0), logits.grad, rtol=1e-10, atol=1e-12)


def test_labels_depend_on_seed_and_window_alone():
    logits = torch.randn(6, 300, 20, generator=torch.Generator().manual_seed(0))
    whole = sampled_labels(logits, 3, 0)
    parts = torch.cat([sampled_labels(logits[:1], 3, 0), sampled_labels(logits[1:5], 3, 1), sampled_labels(logits[5:], 3, 5)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, sampled_labels(logits, 4, 0))
    assert not torch.equal(whole, sampled_labels(logits, 3, 1))


def same(first: dict[str, OutputStatistics], second: dict[str, OutputStatistics]) -> bool:
    assert list(first) == list(second)
    return all(
        torch.equal(a.gradient, b.gradient) and torch.equal(a.fisher_rows, b.fisher_rows)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def test_the_batch_size_changes_rounding_alone(llama: ModelHandle, few: WindowSet):
    one, all_ = (collect_gradients(llama, few, replace(CONFIG, batch_size=size)) for size in (1, 7))
    for name, statistics in one.items():
        scale = float(statistics.gradient.diagonal().mean())
        torch.testing.assert_close(all_[name].gradient, statistics.gradient, rtol=1e-4, atol=1e-5 * scale)


def test_the_same_inputs_give_equal_bits(any_handle: ModelHandle, few: WindowSet):
    first, second = (collect_gradients(any_handle, few, CONFIG) for _ in range(2))
    assert same(first, second)
    assert not same(first, collect_gradients(any_handle, few, replace(CONFIG, gradient_seed=1)))


def without_chain(monkeypatch: pytest.MonkeyPatch, *, free: int) -> None:
    monkeypatch.setattr(gradients._Measurement, "chained", False)
    monkeypatch.setattr(gradients, "free_memory", lambda device: free)


def test_block_by_block_and_whole_passes_of_any_number_are_one(any_handle: ModelHandle, few: WindowSet, monkeypatch: pytest.MonkeyPatch):
    steps: list[tuple[int, int]] = []
    chained = collect_gradients(any_handle, few, CONFIG, progress=lambda *step: steps.append(step))
    depth = any_handle.module.config.num_hidden_layers
    assert steps == [(step, 4 * depth + 2) for step in range(1, 4 * depth + 3)]  # two batches: forward, the end, and back
    steps.clear()
    without_chain(monkeypatch, free=2**40)
    whole = collect_gradients(any_handle, few, CONFIG, progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    for name, statistics in chained.items():
        scale = float(statistics.gradient.diagonal().mean())
        torch.testing.assert_close(whole[name].gradient, statistics.gradient, rtol=1e-5, atol=1e-6 * scale)
    without_chain(monkeypatch, free=0)
    assert same(whole, collect_gradients(any_handle, few, CONFIG, progress=lambda *step: steps.append(step)))
    assert steps[2:] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_model_whose_end_reads_more_than_its_last_block_is_not_chained(llama: ModelHandle, few: WindowSet):
    class Doubled(torch.nn.Module):  # the head also reads what the first block gave
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head, self.kept = head, torch.zeros(())

        def forward(self, hidden: Tensor) -> Tensor:
            return self.head(hidden + self.kept)

    module = copy.deepcopy(llama.module)
    module.lm_head = Doubled(module.lm_head)
    module.model.layers[0].register_forward_hook(lambda _, arguments, output: setattr(module.lm_head, "kept", output))
    reading = replace(llama, module=module)
    assert not BlockRunner(reading).ends_in_logits(few.ids[:1])
    assert BlockRunner(llama).ends_in_logits(few.ids[:1])


def test_only_the_first_windows_are_used(llama: ModelHandle, windows: WindowSet, few: WindowSet):
    config = replace(CONFIG, gradient_windows=7)
    assert same(collect_gradients(llama, windows, config), collect_gradients(llama, few, CONFIG))
    assert gradients_key(llama, windows, config) == gradients_key(llama, few, CONFIG)


def test_the_same_tokens_cut_otherwise_have_gradients_of_their_own(llama: ModelHandle, few: WindowSet, tmp_path: Path):
    short = replace(few, ids=few.ids.reshape(2 * few.windows, -1))
    config = replace(CONFIG, gradient_windows=short.windows)
    assert short.sha256 == few.sha256
    cached_gradients(llama, few, config, tmp_path)
    assert same(cached_gradients(llama, short, config, tmp_path), collect_gradients(llama, short, config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_are_near(llama: ModelHandle, few: WindowSet, dtype: torch.dtype):
    module = type(llama.module)(llama.module.config)
    module.load_state_dict(llama.module.state_dict())
    module.to(dtype).eval()
    fine, coarse = collect_gradients(llama, few, CONFIG), collect_gradients(replace(llama, module=module), few, CONFIG)
    for name, statistics in coarse.items():
        assert statistics.gradient.dtype == torch.float64
        assert float(statistics.gradient.trace()) == pytest.approx(float(fine[name].gradient.trace()), rel=0.5)


def test_the_model_is_left_as_it_was(llama: ModelHandle, few: WindowSet):
    module = type(llama.module)(llama.module.config).eval()  # its parameters require gradients
    module.model.norm.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]

    def stop(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        collect_gradients(replace(llama, module=module), few, CONFIG, progress=stop)
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(child._forward_hooks for child in module.modules())


def test_it_works_where_gradients_are_switched_off(llama: ModelHandle, few: WindowSet):
    with torch.inference_mode():
        inside = collect_gradients(llama, few, CONFIG)
    assert same(inside, collect_gradients(llama, few, CONFIG))


def test_a_bad_gradient_names_the_layer(llama: ModelHandle, few: WindowSet):
    module = type(llama.module)(llama.module.config).eval()
    with torch.no_grad():
        module.model.norm.weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.\S+: the gradient of its output holds NaN or Inf"):
        collect_gradients(replace(llama, module=module), few, CONFIG)


def test_a_model_without_layers_is_refused(llama: ModelHandle, few: WindowSet):
    with pytest.raises(ModelError, match="no dense linear layer"):
        collect_gradients(replace(llama, layers=()), few, CONFIG)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="gradient windows must be at least 1"):
        CalibrationConfig(gradient_windows=0)
    with pytest.raises(ConfigError, match="gradient seed must be at least 0"):
        CalibrationConfig(gradient_seed=-1)


# kept on disk


def test_a_second_run_finds_them(llama: ModelHandle, few: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = cached_gradients(llama, few, CONFIG, tmp_path)
    monkeypatch.setattr(gradients, "_Measurement", None)
    assert same(first, cached_gradients(llama, few, CONFIG, tmp_path))
    assert same(first, {name: first[name] for name in first})


def test_an_interrupted_measurement_goes_on(llama: ModelHandle, few: WindowSet, tmp_path: Path):
    whole, depth = collect_gradients(llama, few, CONFIG), llama.module.config.num_hidden_layers
    last_block_is_done = 2 * depth + 2 + 2
    with pytest.raises(Cancelled):
        cached_gradients(llama, few, CONFIG, tmp_path, progress=stopping_after(last_block_is_done))
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in (folder / "outputs").iterdir()] == [f"block-{depth - 1:03d}.safetensors"]
    assert same(whole, cached_gradients(llama, few, CONFIG, tmp_path))
    assert not list(folder.glob("hidden-*"))


def test_interrupted_whole_passes_go_on(llama: ModelHandle, few: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_chain(monkeypatch, free=0)
    whole = collect_gradients(llama, few, CONFIG)
    with pytest.raises(Cancelled):
        cached_gradients(llama, few, CONFIG, tmp_path, progress=stopping_after(2))
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in (folder / "outputs").iterdir()] == ["block-000.safetensors"]
    steps: list[tuple[int, int]] = []
    assert same(whole, cached_gradients(llama, few, CONFIG, tmp_path, progress=lambda *step: steps.append(step)))
    assert steps == [(1, 2), (2, 2)]


def test_damage_is_told(llama: ModelHandle, few: WindowSet, tmp_path: Path):
    cached_gradients(llama, few, CONFIG, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "outputs" / "block-001.safetensors").write_bytes(b"cut")
    with pytest.raises(NumericalError, match="Delete that folder"):
        cached_gradients(llama, few, CONFIG, tmp_path)


def test_statistics_take_them_along_and_warn_of_few_tokens(llama: ModelHandle, windows: WindowSet, few: WindowSet):
    statistics = collect_statistics(llama, windows, CONFIG)
    assert not statistics.outputs
    assert not statistics.warnings()
    outputs = collect_gradients(llama, few, CONFIG)
    result = statistics.with_outputs(outputs)
    assert result.inputs is statistics.inputs
    assert result.outputs is outputs
    (warning,) = result.warnings()
    assert "gradient moments rest on fewer than 8 tokens per dimension" in warning
    assert "112 tokens for 80 dimensions" in warning

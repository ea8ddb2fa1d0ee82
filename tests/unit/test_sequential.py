"""Block by block: each matrix is fitted to what the compressed matrices before it really give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operands import inputs_of, random, rows
from torch import Tensor

from lowrank_core.allocation import RankAllocation, allocate, allocation_from_ranks
from lowrank_core.compression.build import CompressedModel, compress
from lowrank_core.compression.decomposed import decompose
from lowrank_core.compression.sequential import DriftMoments, _DriftAccumulator, compress_sequentially
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.decomposition.factorization import Damping
from lowrank_core.decomposition.units import factorize, units_of
from lowrank_core.errors import Cancelled, ConfigError, NumericalError
from lowrank_core.layers.base import CompressedModule
from lowrank_core.metrics import metric_named
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.handle import weight_of
from lowrank_core.parameters import HeadUnit
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.text import WindowSet

WHITENED = CompressionConfig(basis="drift_aware", value_dense=False)
TWO_SIDED = CompressionConfig(basis="drift_aware:two_sided", value_dense=False)
FIRST = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")


@pytest.fixture(scope="module")
def statistics(llama: ModelHandle, windows: WindowSet) -> LayerStatistics:
    config = CalibrationConfig(group_size=40)
    return collect_statistics(llama, windows, config).with_outputs(collect_gradients(llama, windows, config))


def compressed(
    handle: ModelHandle,
    windows: WindowSet,
    statistics: LayerStatistics,
    config: CompressionConfig,
    allocation: RankAllocation,
    **options: object,
) -> CompressedModel:
    bases = factorize(handle, statistics, units_of(handle, config), config)
    basis, damping = metric_named(config.basis), Damping(config.input_damping, config.gradient_damping)
    return compress_sequentially(handle, windows, statistics, bases, allocation, basis, damping=damping, **options)  # type: ignore[arg-type]


def at_once(handle: ModelHandle, statistics: LayerStatistics, config: CompressionConfig, allocation: RankAllocation) -> CompressedModel:
    return compress(handle, factorize(handle, statistics, units_of(handle, config), config), allocation)


def uniform(handle: ModelHandle, config: CompressionConfig, ratio: float = 0.5) -> RankAllocation:
    return allocate("uniform", units_of(handle, replace(config, stacks=False, heads=False)), ratio)


def hidden_states(handle: ModelHandle, windows: WindowSet) -> Tensor:
    """Return what the head reads, over all windows."""
    with torch.inference_mode():
        result: Tensor = handle.module.base_model(input_ids=windows.ids, use_cache=False).last_hidden_state
    return result.double()


def outputs(handle: ModelHandle, name: str, windows: WindowSet) -> Tensor:
    seen: list[Tensor] = []
    hook = handle.module.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output.double().flatten(0, 1)))
    try:
        hidden_states(handle, windows)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("inner", ["whitened", "two_sided"])
def test_where_nothing_is_compressed_before_drift_aware_is_its_inner_basis(
    inner: str, llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics
):
    aware = CompressionConfig(basis=f"drift_aware:{inner}", value_dense=False)
    plain = replace(aware, basis=inner)
    allocation = uniform(llama, aware)
    ours = compressed(llama, windows, statistics, aware, allocation).handle.module
    theirs = at_once(llama, statistics, plain, allocation).handle.module
    for name in FIRST:
        torch.testing.assert_close(ours.get_submodule(name).weight, theirs.get_submodule(name).weight, rtol=1e-4, atol=1e-5)
    last = "model.layers.1.mlp.down_proj"  # it reads what all others changed
    assert (ours.get_submodule(last).weight - theirs.get_submodule(last).weight).abs().max() > 1e-3


def test_drift_aware_is_closer_to_the_dense_hidden_states_than_whitened_at_equal_ranks(
    llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics
):
    allocation = uniform(llama, WHITENED)
    dense = hidden_states(llama, windows)
    aware = compressed(llama, windows, statistics, WHITENED, allocation)
    plain = at_once(llama, statistics, replace(WHITENED, basis="whitened"), allocation)
    assert aware.report.ranks == plain.report.ranks
    gaps = [float((hidden_states(model.handle, windows) - dense).square().mean()) for model in (aware, plain)]
    assert gaps[0] < 0.99 * gaps[1]


def test_each_layer_is_least_squares_optimal_for_the_inputs_it_really_reads(
    llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics
):
    """The last layer: no other weights of its rank come closer to the dense output from x'; those fitted at once don't come as close."""
    allocation = uniform(llama, WHITENED)
    model = compressed(llama, windows, statistics, WHITENED, allocation)
    name = "model.layers.1.mlp.down_proj"
    rank = allocation.ranks[name]
    target = outputs(llama, name, windows)
    reads: list[Tensor] = []
    hook = model.handle.module.get_submodule(name).register_forward_pre_hook(lambda _, arguments: reads.append(arguments[0].double()))
    result = outputs(model.handle, name, windows)
    hook.remove()
    x = reads[0].flatten(0, 1)
    fitted = x @ torch.linalg.lstsq(x, target).solution
    assert rank is not None
    top = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
    best = float((target - fitted @ top.T @ top).square().sum())
    assert float((target - result).square().sum()) == pytest.approx(best, rel=1e-2)


def test_a_centred_basis_keeps_the_dense_mean_output_of_every_layer(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    """Although what the layer reads has drifted, in mean, too."""
    allocation = uniform(llama, TWO_SIDED)
    model = compressed(llama, windows, statistics, TWO_SIDED, allocation)
    plain = at_once(llama, statistics, replace(TWO_SIDED, basis="two_sided"), allocation)
    drifts = 0
    for name in allocation.ranks:
        dense = outputs(llama, name, windows).mean(0)
        torch.testing.assert_close(outputs(model.handle, name, windows).mean(0), dense, rtol=1e-4, atol=1e-5)
        drifts += bool((outputs(plain.handle, name, windows).mean(0) - dense).abs().max() > 1e-3)
    assert drifts > 3  # fitted at once, they do not


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_counts_are_those_of_the_allocation(storage: str, llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    config = replace(TWO_SIDED, storage=storage)
    allocation = uniform(llama, config)
    report = compressed(llama, windows, statistics, config, allocation).report
    assert report.linear_parameters_after == allocation.parameters
    assert report.ranks == allocation.ranks


def test_stacks_and_heads_are_fitted_and_counted(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    """A stack as a whole; heads as they are."""
    config = replace(TWO_SIDED, storage="pivoted", stacks=True, heads=True)
    units = units_of(llama, config)
    stack = next(unit for unit in units if len(unit.members) == 2 and unit.members[0].kind == "gate_proj" and unit.depth == 1)
    head = next(unit for unit in units if isinstance(unit, HeadUnit) and unit.depth == 0)
    allocation = allocation_from_ranks("manual", units, {stack.name: 12, head.name: 5, "model.layers.1.self_attn.q_proj": 9})
    model = compressed(llama, windows, statistics, config, allocation)
    assert model.report.linear_parameters_after == allocation.parameters
    names = {name for name, child in model.handle.module.named_modules() if isinstance(child, CompressedModule)}
    assert names == {member.name for unit in (stack, head) for member in unit.members} | {"model.layers.1.self_attn.q_proj"}
    plain = at_once(llama, statistics, replace(config, basis="two_sided"), allocation).handle.module
    value = model.handle.module.get_submodule(head.members[0].name)
    assert torch.equal(value.weight, plain.get_submodule(head.members[0].name).weight)


def test_the_dense_model_is_left_alone_and_the_new_one_can_be_trained(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    before = {name: parameter.clone() for name, parameter in llama.module.named_parameters()}
    module = compressed(llama, windows, statistics, TWO_SIDED, uniform(llama, TWO_SIDED)).handle.module
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.module.named_parameters())
    assert not any(child._forward_pre_hooks or child._forward_hooks for model in (llama.module, module) for child in model.modules())
    assert not {p.data_ptr() for p in llama.module.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert not any(parameter.is_inference() for parameter in module.parameters())
    module.requires_grad_(True)(input_ids=windows.ids[:1], labels=windows.ids[:1]).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_batch_size_changes_nothing_but_rounding(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    """In what the model computes; weights in directions that no input has (the values have a low rank) may differ."""
    allocation = uniform(llama, WHITENED)
    batched = (replace(statistics, config=replace(statistics.config, batch_size=size)) for size in (7, 40))
    one, other = (hidden_states(compressed(llama, windows, by, WHITENED, allocation).handle, windows) for by in batched)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))


def test_progress_rises_by_one_to_the_total(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    seen: list[tuple[int, int]] = []
    compressed(llama, windows, statistics, WHITENED, uniform(llama, WHITENED), progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert total == (8 + 2) * 5  # four inputs in each of two blocks, and the step past each block; 40 windows in batches of 8


def test_a_cancelled_fit_leaves_no_hook(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    def cancel(done: int, total: int) -> None:
        if done == 13:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        compressed(llama, windows, statistics, WHITENED, uniform(llama, WHITENED), progress=cancel)
    assert not any(child._forward_pre_hooks or child._forward_hooks for child in llama.module.modules())


def test_a_stack_over_several_inputs_is_refused(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    config = CompressionConfig(basis="drift_aware:cross_layer", value_dense=False)
    with pytest.raises(
        ConfigError, match=r"a stack over several inputs can't be drift-aware\. Use a stack of one input, or drop drift_aware"
    ):
        compressed(llama, windows, statistics, config, uniform(llama, config))


def test_a_model_that_diverges_on_the_way_names_the_layer(llama_checkpoint: str, windows: WindowSet, statistics: LayerStatistics):
    handle = load_model(ModelSource(str(llama_checkpoint)))
    allocation = uniform(handle, WHITENED)
    handle.module.model.layers[0].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(
        NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj: its input holds NaN or Inf in the model compressed so far"
    ):
        compressed(handle, windows, statistics, WHITENED, allocation)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_other_architectures_are_fitted_block_by_block(name: str, windows: WindowSet, request: pytest.FixtureRequest):
    """Transposed weights with biases; biases on some layers only."""
    handle = load_model(ModelSource(str(request.getfixturevalue(f"{name}_checkpoint"))))
    statistics = collect_statistics(handle, windows, CalibrationConfig(group_size=40))
    allocation = uniform(handle, WHITENED)
    aware = compressed(handle, windows, statistics, WHITENED, allocation)
    plain = at_once(handle, statistics, replace(WHITENED, basis="whitened"), allocation)
    dense = hidden_states(handle, windows)
    gaps = [float((hidden_states(model.handle, windows) - dense).square().mean()) for model in (aware, plain)]
    assert gaps[0] < gaps[1]
    assert aware.report.linear_parameters_after == allocation.parameters


def test_full_ranks_reproduce_the_dense_model(llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics):
    """Nothing drifts, so nothing is corrected: also a heavy damping draws towards the dense weights, not to zero."""
    config = replace(WHITENED, input_damping=1e-2)
    units = units_of(llama, config)
    bases = factorize(llama, statistics, units, config)
    allocation = RankAllocation("manual", {unit.name: unit.max_rank for unit in units}, 1, 1)
    basis = metric_named(config.basis)
    model = compress_sequentially(llama, windows, statistics, bases, allocation, basis, damping=Damping(columns=1e-2))
    for shape in llama.shapes:
        expected = weight_of(llama.module.get_submodule(shape.name))
        torch.testing.assert_close(model.handle.module.get_submodule(shape.name).weight, expected, rtol=1e-3, atol=1e-3)


def test_a_recipe_with_a_sequential_basis_is_fitted_on_its_first_windows(
    llama: ModelHandle, windows: WindowSet, statistics: LayerStatistics
):
    """As many as the config says; a basis that is not sequential is fitted at once, whatever the windows."""

    def same(one: CompressedModel, other: CompressedModel) -> bool:
        return torch.equal(hidden_states(one.handle, windows), hidden_states(other.handle, windows))

    config = replace(TWO_SIDED, fit_windows=16)
    result = decompose(llama, statistics, config)
    allocation = result.allocate("uniform", 0.5)
    fitted = result.compress(allocation, windows)
    assert same(fitted, compressed(llama, windows.first(16), statistics, config, allocation))
    assert not same(fitted, compressed(llama, windows, statistics, config, allocation))
    plain = decompose(llama, statistics, replace(config, basis="two_sided"))
    assert same(plain.compress(allocation, windows), at_once(llama, statistics, plain.config, allocation))


# --- moments of both models ------------------------------------------------------------------------------------------


def drift_of(x: Tensor, y: Tensor, mean: Tensor, chunk: int = 400, weights: Tensor | None = None, *, whole: bool = False) -> DriftMoments:
    accumulator = _DriftAccumulator(mean, torch.device("cpu"), whole=whole)
    parts = [None] * len(x) if weights is None else weights.split(chunk)
    for dense, own, part in zip(x.split(chunk), y.split(chunk), parts, strict=False):
        accumulator.update(dense[None], own[None], part)
    return accumulator.finish()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 400])
def test_cross_moments_are_those_of_two_passes(chunk: int, whole: bool):
    x = rows(10, mean=3.0)
    y = 0.8 * x + 0.1 * random(*x.shape, seed=3) + 1.5
    result = drift_of(x, y, x.mean(0), chunk, whole=whole).among(inputs_of(x))
    statistics = result.statistics()
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # products are taken in float32
    torch.testing.assert_close(statistics.mean, y.mean(0), **tolerance)
    torch.testing.assert_close(statistics.absolute_mean, y.abs().mean(0), **tolerance)
    torch.testing.assert_close(statistics.sample, torch.cov(y.T), **tolerance)
    torch.testing.assert_close(statistics.second_moment, y.T @ y / len(y), **tolerance)
    torch.testing.assert_close(result.between(centred=False), x.T @ y / len(x), **tolerance)
    torch.testing.assert_close(result.between(centred=True), torch.cov(torch.cat([x, y], 1).T)[:10, 10:], **tolerance)
    assert torch.equal(statistics.pooled, statistics.sample)


def test_tokens_that_only_the_dense_model_was_run_on_count_as_tokens_without_drift():
    x = rows(10, mean=3.0)
    y = x.clone()
    y[:100] = 0.5 * x[:100] + random(100, 10, seed=3)
    result = drift_of(x[:100], y[:100], x.mean(0)).among(inputs_of(x))
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result.statistics().mean, y.mean(0), **tolerance)
    torch.testing.assert_close(result.statistics().absolute_mean, y.abs().mean(0), **tolerance)
    torch.testing.assert_close(result.statistics().sample, torch.cov(y.T), **tolerance)
    torch.testing.assert_close(result.between(centred=False), x.T @ y / len(x), **tolerance)
    torch.testing.assert_close(result.between(centred=True), torch.cov(torch.cat([x, y], 1).T)[:10, 10:], **tolerance)


def test_tokens_weigh_in_the_drift_as_in_the_statistics():
    x, weights = rows(10, mean=3.0), random(400, seed=4).abs()
    y = 0.8 * x + 0.1 * random(*x.shape, seed=3)
    weights = weights[: len(x)]
    result = drift_of(x, y, x.mean(0), 7, weights)
    share = weights / weights.sum()
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result.mean, share @ (y - x), **tolerance)
    torch.testing.assert_close(result.own, (y - x).T @ (share[:, None] * (y - x)), **tolerance)
    torch.testing.assert_close(result.cross, (x - x.mean(0)).T @ (share[:, None] * (y - x)), **tolerance)


@pytest.mark.parametrize("whole", [True, False])
def test_further_tokens_of_the_dense_model_count_as_tokens_without_drift(whole: bool):
    x = rows(10, mean=3.0)
    y, dense = 0.5 * x, inputs_of(x)
    given = drift_of(x, y, x.mean(0), whole=whole)
    result = given.among(dense, prior=len(x))
    torch.testing.assert_close(result.compressed_mean, 0.75 * x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.cross, (given.among(dense).cross + dense.moment_about(dense.mean)) / 2, rtol=1e-5, atol=1e-5)


def test_a_direction_that_the_drift_takes_away_is_nothing_and_not_less_where_all_tokens_are_fitted():
    """Statistics of the dense model may be rounded to bfloat16: what is left of a direction is not their difference to float32."""
    x = rows(10, mean=3.0)
    y = x.clone()
    y[:, 0] = x[:, 0].mean()
    rounded = inputs_of(x * (1 - 1e-3))
    left = drift_of(x, y, rounded.mean, whole=True).among(rounded).statistics().sample
    assert float(left[0, 0]) == pytest.approx(0, abs=1e-8)
    assert float(drift_of(x, y, rounded.mean).among(rounded).statistics().sample[0, 0]) < -1e-6 * float(left.diagonal().mean())


@pytest.mark.parametrize("centred", [True, False])
def test_without_drift_the_cross_moment_is_the_own_one(centred: bool):
    x = rows(10, mean=3.0)
    result = drift_of(x, x, x.mean(0)).among(inputs_of(x))
    own = result.statistics().sample if centred else result.statistics().second_moment
    torch.testing.assert_close(result.between(centred=centred), own, rtol=1e-12, atol=1e-12)

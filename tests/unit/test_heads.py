"""Value and output projections, head by head: lossless at head_dim, and the reported error is the one that is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operands import gradients, inputs_of, outputs_of, random, rows
from torch import Tensor

from lowrank_core.allocation import allocation_from_ranks
from lowrank_core.compression.build import compress, low_rank_layers, swap_layers
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.decomposition.factorization import Damping, isotonic_upper_bound
from lowrank_core.decomposition.head_factorization import HeadBasis, factorize_heads
from lowrank_core.decomposition.units import factorize, units_of
from lowrank_core.errors import NumericalError, RankError
from lowrank_core.layers.forms import HeadFactors
from lowrank_core.layers.heads import OutputHeads, ValueHeads
from lowrank_core.metrics import LayerData, metric_named
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.attention import head_units
from lowrank_core.parameters import HeadUnit, MatrixShape
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.text import WindowSet

DIM, WIDTH, HEIGHT = 5, 16, 12
LAYOUTS = {"multi-head": (3, 3), "grouped": (4, 2), "multi-query": (3, 1)}
NAMES = [
    "whitened",
    "two_sided",
    "two_sided_half",
    "pooled_feature",
    "weight_svd",
    "fisher_rows",
    "activation_scaled",
    "drift_aware:two_sided",
]
IDS = torch.tensor([[0, 5, 9, 44, 120, 7, 80, 3]])


def case(heads: int, groups: int, *, bias: bool = True) -> tuple[HeadUnit, LayerData, LayerData, Tensor]:
    """Return a unit, its operands, and the inputs z (tokens, heads · DIM) of the output projection: averaged values, and noise."""
    x = rows(WIDTH)
    shapes = MatrixShape("v", "v", 0, groups * DIM, WIDTH, bias), MatrixShape("o", "o", 0, HEIGHT, heads * DIM, bias)
    value = LayerData(shapes[0], random(groups * DIM, WIDTH, seed=1), random(groups * DIM, seed=2) if bias else None, inputs_of(x))
    values = (x @ value.weight.T + (0 if value.bias is None else value.bias)).reshape(-1, groups, DIM).repeat_interleave(heads // groups, 1)
    z = (values * torch.rand(heads, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).flatten(1)
    z = z + 0.3 * rows(heads * DIM, seed=8, mean=0.0)
    weight, b = random(HEIGHT, heads * DIM, seed=4), random(HEIGHT, seed=5) if bias else None
    output = LayerData(shapes[1], weight, b, inputs_of(z), outputs_of(gradients(HEIGHT), z))
    return HeadUnit(shapes, heads=heads, groups=groups, head_dim=DIM), value, output, z


def factorized(
    name: str, heads: int, groups: int, *, bias: bool = True, damping: Damping | None = None
) -> tuple[HeadBasis, LayerData, LayerData, Tensor]:
    unit, value, output, z = case(heads, groups, bias=bias)
    basis = metric_named(name)
    return factorize_heads(replace(unit, adds_bias=basis.centred), value, output, basis, damping or Damping()), value, output, z


def reduced(factors: HeadFactors, value: LayerData, z: Tensor) -> Tensor:
    """Return what the reduced heads hand to the output projection (heads, tokens, r), where the dense ones hand over z."""
    groups, heads = len(factors.values), len(factors.outputs)
    dense = value.weight.reshape(groups, DIM, WIDTH)
    mix = (factors.values @ torch.linalg.pinv(dense)).repeat_interleave(heads // groups, 0)  # V' = mix · V
    return torch.einsum("hrd,thd->htr", mix, z.reshape(len(z), heads, DIM))


def per_head_errors(factors: HeadFactors, value: LayerData, output: LayerData, z: Tensor) -> Tensor:
    """Return O_h z_h - O'_h z'_h (heads, tokens, m)."""
    heads = len(factors.outputs)
    dense = torch.einsum("mhd,thd->htm", output.weight.reshape(HEIGHT, heads, DIM), z.reshape(len(z), heads, DIM))
    return dense - torch.einsum("hmr,htr->htm", factors.outputs, reduced(factors, value, z))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_whole_heads_lose_nothing(name: str, layout: str, bias: bool):
    result, value, output, z = factorized(name, *LAYOUTS[layout], bias=bias)
    assert result.max_rank == DIM
    factors = result.slice(DIM)
    gone = per_head_errors(factors, value, output, z)
    assert gone.abs().max() < 1e-9
    total = reduced(factors, value, z)
    outputs = torch.einsum("hmr,htr->tm", factors.outputs, total)
    dense = z @ output.weight.T + (0 if output.bias is None else output.bias)
    torch.testing.assert_close(outputs + (0 if factors.output_bias is None else factors.output_bias), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["whitened", "two_sided", "pooled_feature"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reported_error_is_the_sum_over_heads_of_the_measured_ones(name: str, layout: str):
    result, value, output, z = factorized(name, *LAYOUTS[layout], damping=Damping(columns=1e-9))
    centred, gradient = metric_named(name).centred, torch.eye(HEIGHT, dtype=torch.float64)
    if name == "two_sided":
        assert output.outputs is not None
        gradient = output.outputs.gradient + 1e-2 * output.outputs.gradient.trace() / HEIGHT * gradient
    measured = []
    for rank in range(1, DIM + 1):
        gone = per_head_errors(result.slice(rank), value, output, z)
        gone = gone - gone.mean(1, keepdim=True) if centred else gone  # the bias takes the mean of the sum
        measured.append(float((gone @ gradient * gone).sum()) / (len(z) - centred) * (0.5 if name == "two_sided" else 1.0))
    curve = torch.tensor(measured, dtype=torch.float64)
    torch.testing.assert_close(result.errors[1:], isotonic_upper_bound(curve), rtol=1e-8, atol=1e-9 * float(result.errors[0]))
    torch.testing.assert_close(result.errors[1:], curve, rtol=1e-8, atol=1e-9 * float(result.errors[0]))


def test_where_heads_of_a_group_disagree_the_reported_error_never_understates():
    """Their mean metric is none of theirs: a dimension more can then make one head worse than the others gain."""
    unit, value, output, _ = case(3, 1)
    scales = (3 * random(3, DIM, seed=173)).exp()
    z = torch.einsum("thd,hd,hde->the", random(400, 3, DIM, seed=7), scales, random(3, DIM, DIM, seed=1173)).flatten(1)
    output = replace(output, weight=random(HEIGHT, 3 * DIM, seed=173) * random(1, 3 * DIM, seed=178).exp(), inputs=inputs_of(z))
    result = factorize_heads(unit, value, output, metric_named("whitened"), Damping(columns=1e-9))
    measured = [per_head_errors(result.slice(rank), value, output, z).square().sum() / len(z) for rank in range(DIM + 1) if rank]
    dense = torch.einsum("mhd,thd->htm", output.weight.reshape(HEIGHT, 3, DIM), z.reshape(len(z), 3, DIM))
    curve = torch.stack([dense.square().sum() / len(z), *measured])
    assert (curve.diff() > 1e-3 * curve[0]).any()
    torch.testing.assert_close(result.errors, isotonic_upper_bound(curve), rtol=1e-6, atol=1e-9 * float(curve[0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_fall_to_zero(name: str, layout: str):
    result = factorized(name, *LAYOUTS[layout])[0]
    assert len(result.errors) == DIM + 1
    assert (result.errors.diff() <= 0).all()
    assert result.errors[0] > 0
    assert result.errors[-1] == 0


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_where_each_head_has_its_own_values_no_factors_of_equal_rank_do_better(rank: int):
    """Eckart-Young for every head: the tail of the singular values of O_h K_h^½, here of the outputs themselves."""
    result, _, output, z = factorized("whitened", 3, 3, damping=Damping(columns=1e-12))
    best = 0.0
    for head in range(3):
        own = slice(head * DIM, (head + 1) * DIM)
        best += float(torch.linalg.svdvals(z[:, own] @ output.weight[:, own].T)[rank:].square().sum()) / len(z)
    torch.testing.assert_close(float(result.errors[rank]), best, rtol=1e-8, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_heads_of_a_group_share_the_directions_of_their_mean_metric(layout: str, rank: int):
    """O'_h V'_g = O_h K^½ Q_r Q_rᵀ K^-½ V_g, with the right singular vectors Q of the group's stacked O_h K^½."""
    heads, groups = LAYOUTS[layout]
    result, value, output, z = factorized("whitened", heads, groups, damping=Damping(columns=1e-9))
    factors = result.slice(rank)
    for group in range(groups):
        own = range(group * heads // groups, (group + 1) * heads // groups)
        spans = [slice(head * DIM, (head + 1) * DIM) for head in own]
        metric = sum(z[:, span].T @ z[:, span] for span in spans) / len(z) / len(spans)
        root = torch.linalg.cholesky(metric).T  # any root does
        stacked = torch.cat([output.weight[:, span] for span in spans]) @ root.T
        top = torch.linalg.svd(stacked).Vh[:rank]
        projection = root.T @ top.T @ top @ torch.linalg.inv(root.T)
        dense = value.weight[group * DIM : (group + 1) * DIM]
        for head, span in zip(own, spans, strict=True):
            ours = factors.outputs[head] @ factors.values[group]
            torch.testing.assert_close(ours, output.weight[:, span] @ projection @ dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_centred_basis_keeps_the_mean_output(layout: str, rank: int):
    result, value, output, z = factorized("two_sided", *LAYOUTS[layout])
    factors = result.slice(rank)
    assert factors.output_bias is not None
    outputs = torch.einsum("hmr,htr->tm", factors.outputs, reduced(factors, value, z)) + factors.output_bias
    assert output.bias is not None
    torch.testing.assert_close(outputs.mean(0), (z @ output.weight.T + output.bias).mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_are_nested(layout: str):
    result = factorized("two_sided", *LAYOUTS[layout])[0]
    small, large = result.slice(2), result.slice(4)
    assert torch.equal(large.values[:, :2], small.values)
    assert torch.equal(large.outputs[:, :, :2], small.outputs)


@pytest.mark.parametrize("rank", [0, 6])
def test_ranks_outside_the_limits_are_refused(rank: int):
    with pytest.raises(RankError, match=r"v\+o: rank must be in \[1, 5\]"):
        factorized("whitened", 4, 2)[0].slice(rank)


@pytest.mark.parametrize("name", NAMES)
def test_dead_heads_stay_finite_and_lossless(name: str):
    """A head whose input is always zero, and one that nothing reads."""
    unit, value, output, z = case(4, 2)
    z[:, : 2 * DIM] = 0
    output.weight[:, -DIM:] = 0
    output = replace(output, inputs=inputs_of(z))
    result = factorize_heads(unit, value, output, metric_named(name), Damping())
    assert all(torch.isfinite(part).all() for part in (result.values, result.outputs, result.errors))
    assert result.damping > 0
    if metric_named(name).needs_data:
        assert result.condition == float("inf")
    factors = result.slice(DIM)
    every = random(50, 4 * DIM, seed=77)  # not only what was seen
    assert per_head_errors(factors, value, output, every).abs().max() < 1e-8


@pytest.mark.parametrize("part", ["value", "output"])
def test_weights_that_are_not_finite_name_the_layer(part: str):
    unit, value, output, _ = case(4, 2)
    broken = value if part == "value" else output
    broken.weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match=f"{part[0]}: its weight or bias holds NaN or Inf"):
        factorize_heads(unit, value, output, metric_named("whitened"), Damping())


def test_a_singular_metric_without_damping_names_the_layer():
    unit, value, output, z = case(4, 2)
    z[:, [0, DIM]] = 0
    with pytest.raises(NumericalError, match=r"v\+o: its metric is singular"):
        factorize_heads(unit, value, replace(output, inputs=inputs_of(z)), metric_named("whitened"), Damping(columns=0.0))


# --- in models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def handle(request: pytest.FixtureRequest) -> ModelHandle:
    return load_model(ModelSource(str(request.getfixturevalue(f"{request.param}_checkpoint"))))


def logits(handle: ModelHandle) -> Tensor:
    with torch.inference_mode():
        result: Tensor = handle.module(input_ids=IDS, use_cache=False).logits
    return result


def test_value_and_output_projections_are_found(handle: ModelHandle):
    result = head_units(handle)
    pairs = [tuple(member.name for member in unit.members) for unit in result]
    assert pairs == [tuple(f"model.layers.{depth}.self_attn.{part}_proj" for part in "vo") for depth in range(2)]
    assert {(unit.heads, unit.groups, unit.head_dim) for unit in result} == {(4, 2, 8)}


def test_fused_projections_have_heads_unless_they_stay_fused(gpt2_checkpoint: str):
    fused = [f"transformer.h.{depth}.attn.c_attn" for depth in range(2)]
    pairs = [tuple(member.name for member in unit.members) for unit in head_units(load_model(str(gpt2_checkpoint)))]
    assert pairs == [(f"{name}.v_proj", f"{name.removesuffix('c_attn')}c_proj") for name in fused]
    assert head_units(load_model(str(gpt2_checkpoint), whole=fused)) == ()


def test_finding_heads_leaves_no_hook(handle: ModelHandle):
    head_units(handle)
    assert not any(module._forward_hooks for module in handle.module.modules())


@pytest.mark.parametrize("basis", ["whitened", "two_sided", "pooled_feature", "weight_svd"])
def test_whole_heads_of_a_model_give_the_dense_logits(basis: str, handle: ModelHandle, windows: WindowSet):
    config = CompressionConfig(basis=basis, heads=True, value_dense=False)
    calibration = CalibrationConfig(group_size=8)
    statistics = collect_statistics(handle, windows, calibration).with_outputs(collect_gradients(handle, windows, calibration))
    units = [unit for unit in units_of(handle, config) if isinstance(unit, HeadUnit)]
    assert len(units) == 2
    assert all(unit.adds_bias == metric_named(basis).centred for unit in units)
    bases = factorize(handle, statistics, units, config)
    dense = logits(handle)
    with swap_layers(handle, low_rank_layers(handle, bases, {unit.name: unit.head_dim for unit in units})):
        kinds = {type(handle.module.get_submodule(member.name)) for unit in units for member in unit.members}
        assert kinds == {ValueHeads, OutputHeads}
        torch.testing.assert_close(logits(handle), dense, rtol=1e-4, atol=1e-4)
    gaps = []
    for rank in (2, 5, 7):
        with swap_layers(handle, low_rank_layers(handle, bases, {unit.name: rank for unit in units})):
            gaps.append(float((logits(handle) - dense).square().mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] > 1e-6


def test_heads_have_the_counted_parameters(handle: ModelHandle, windows: WindowSet):
    config = CompressionConfig(basis="pooled_feature", heads=True, value_dense=False)
    units = units_of(handle, config)
    heads = [unit for unit in units if isinstance(unit, HeadUnit)]
    bases = factorize(handle, collect_statistics(handle, windows, CalibrationConfig()), heads, config)
    allocation = allocation_from_ranks("manual", units, {unit.name: 3 for unit in heads})
    model = compress(handle, bases, allocation)
    assert model.report.linear_parameters_after == allocation.parameters
    for unit in heads:
        value, output = (model.handle.module.get_submodule(member.name) for member in unit.members)
        stored = sum(p.numel() for layer in (value, output) for p in layer.parameters()) + value.pivots.numel()
        assert stored == unit.parameters(3)

"""From factors to a smaller model: what is counted is what is built, and the dense model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_core.allocation import Draft, RankAllocation, Ranks, allocate, allocation_from_ranks
from lowrank_core.compression.build import CompressedModel, compress, low_rank_layers, swap_layers
from lowrank_core.compression.decomposed import Decomposed
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.decomposition.units import Bases, error_curves, factorize, operand_of, units_of
from lowrank_core.errors import ConfigError, NumericalError, RankError
from lowrank_core.layers.base import CompressedModule
from lowrank_core.layers.forms import Factors
from lowrank_core.metrics import METRICS
from lowrank_core.models import ModelHandle, describe
from lowrank_core.models.handle import weight_of
from lowrank_core.parameters import HeadUnit, Unit, allocated_parameters, budget_for_ratio
from lowrank_core.runs import Run, write_json
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.statistics.gradients import collect_gradients
from lowrank_core.studio.manual.rank_table import bill
from lowrank_core.studio.shared.model_facts import model_facts
from lowrank_core.text import WindowSet

IDS = torch.tensor([[0, 5, 9, 44, 120, 7, 80, 3]])
CONFIGS = {
    **{name: CompressionConfig(basis=name, value_dense=False) for name in METRICS},
    "pivoted": CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False),
    "pivoted stacks": CompressionConfig(basis="shared_input:two_sided", storage="pivoted", value_dense=False),
    "pivoted stacks across layers": CompressionConfig(basis="cross_layer", storage="pivoted", value_dense=False),
    "value dense": CompressionConfig(basis="two_sided", storage="pivoted", value_dense=True),
    "alternatives": CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False, stacks=True, heads=True),
}
STORED = ("pooled_feature", "shared_input", "pivoted", "pivoted stacks", "pivoted stacks across layers", "value dense", "alternatives")
CASES = [
    *(("llama", name) for name in CONFIGS),
    *(("gpt2", name) for name in (*STORED, "fisher_rows", "cross_layer")),
    *(("qwen2", name) for name in (*STORED, "two_sided", "activation_scaled")),
]
"""Every metric in one architecture, and every form of units and of storage in all: a metric is given matrices and knows no architecture."""
every_case = pytest.mark.parametrize(("any_handle", "case"), CASES, indirect=True, scope="module")


@dataclass(frozen=True)
class Case:
    handle: ModelHandle
    units: tuple[Unit, ...]
    bases: Bases
    config: CompressionConfig

    @cached_property
    def model(self) -> CompressedModel:
        """Compressed by 0.4, for tests that leave it as it is."""
        return compress(self.handle, self.bases, self.allocation(0.4))

    def allocation(self, ratio: float) -> RankAllocation:
        keep = [shape.name for shape in self.handle.shapes if shape.kind == "v_proj"] if self.config.value_dense else []
        by = "lagrangian" if self.config.stacks else "uniform"
        return allocate(by, self.units, ratio, keep_dense=keep, curves=error_curves(self.bases))


@pytest.fixture(scope="module")
def statistics(any_handle: ModelHandle, windows: WindowSet) -> LayerStatistics:
    config = CalibrationConfig(group_size=8)
    return collect_statistics(any_handle, windows, config).with_outputs(collect_gradients(any_handle, windows, config))


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, any_handle: ModelHandle, statistics: LayerStatistics) -> Case:
    config = CONFIGS[request.param]
    units = units_of(any_handle, config)
    return Case(any_handle, units, factorize(any_handle, statistics, units, config), config)


def logits(handle: ModelHandle) -> Tensor:
    with torch.inference_mode():
        result: Tensor = handle.module(input_ids=IDS, use_cache=False).logits
    return result


def counted(model: torch.nn.Module) -> tuple[int, int]:
    """Return the weights and the indices that a state dict holds, tied ones once."""
    stored = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}.values()
    return sum(t.numel() for t in stored if t.is_floating_point()), sum(t.numel() for t in stored if not t.is_floating_point())


@every_case
def test_counted_parameters_are_those_of_the_built_model(case: Case):
    allocation, model = case.allocation(0.4), case.model
    weights, indices = counted(model.handle.module)
    assert weights == sum(p.numel() for p in model.handle.module.parameters())
    report = model.report
    assert report.parameters_after == model.handle.parameters == weights + indices
    assert report.linear_parameters_after == allocation.parameters == allocated_parameters(case.units, allocation.ranks)
    assert report.parameters_before - report.parameters_after == allocation.dense_parameters - allocation.parameters
    assert report.bytes_after == 4 * weights + 4 * indices  # the tiny checkpoints are stored in float32, indices in int32
    assert report.ranks == allocation.ranks
    assert (indices > 0) == (case.config.storage == "pivoted")


@every_case
def test_the_bill_of_a_draft_is_that_of_the_built_model(case: Case, tmp_path: Path):
    """What the page Manual allocation shows before anything is built."""
    allocation = case.allocation(0.4)
    report = case.model.report
    run = Run(tmp_path)
    write_json(tmp_path / "model.json", describe(case.handle))
    facts = model_facts(run)
    assert facts is not None
    result = bill(Draft.of(case.units, allocation.ranks), facts, 0.4, run_ratio=0.4)
    assert (result.kept, result.dense) == (report.linear_parameters_after, report.linear_parameters_before)
    assert (result.model, result.dense_model) == (report.parameters_after, report.parameters_before)
    assert (result.bytes, result.dense_bytes) == (report.bytes_after, report.bytes_before)
    assert (result.flops, result.dense_flops) == (report.model_flops_after, report.model_flops_before)  # as Compare shows it
    assert (result.removed, result.model_removed) == (report.compression_ratio, report.model_compression_ratio)


@every_case
def test_the_budget_is_met_and_reported(case: Case):
    report = case.model.report
    budget = budget_for_ratio(case.units, 0.4)
    step = max(unit.parameters(1) for unit in case.units)
    assert budget - step < report.linear_parameters_after <= budget
    assert report.compression_ratio == 1 - report.linear_parameters_after / report.linear_parameters_before
    assert 0 < report.model_compression_ratio < report.compression_ratio


@every_case
def test_each_unit_has_the_parameters_of_its_price(case: Case):
    module = case.model.handle.module
    for name, rank in case.allocation(0.4).ranks.items():
        unit = case.bases[name].unit
        built = [module.get_submodule(member.name) for member in unit.members]
        assert all(isinstance(layer, CompressedModule) == (rank is not None) for layer in built)
        assert sum(sum(counted(layer)) for layer in built) == unit.parameters(rank)
        dtypes = {tensor.dtype for layer in built for tensor in layer.state_dict().values() if not tensor.is_floating_point()}
        assert dtypes <= {torch.int32}


@every_case
def test_counted_flops_are_those_that_torch_counts(case: Case):
    def executed(module: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(input_ids=IDS, use_cache=False)
        return counter.get_total_flops()

    report, tokens = case.model.report, IDS.numel()
    assert executed(case.handle.module) - executed(case.model.handle.module) == tokens * (
        report.linear_flops_before - report.linear_flops_after
    )
    assert report.model_flops_before - report.model_flops_after == report.linear_flops_before - report.linear_flops_after
    assert report.linear_flops_before == 2 * sum(shape.d_out * shape.d_in for shape in case.handle.shapes)


@every_case
def test_each_unit_tells_its_counts_and_its_condition(case: Case):
    report = case.model.report
    assert {unit.name: unit.rank for unit in report.units} == {name: rank for name, rank in report.ranks.items() if rank is not None}
    saved = sum(unit.dense_parameters - unit.parameters for unit in report.units)
    assert saved == report.parameters_before - report.parameters_after
    assert sum(unit.dense_bytes - unit.bytes for unit in report.units) == report.bytes_before - report.bytes_after
    for unit in report.units:
        assert unit.damping >= 0
        assert unit.condition is None or unit.condition >= 1
        assert (unit.largest_coefficient is not None) == (unit.storage == "pivoted")
        assert (unit.storage == "per_head") == isinstance(case.bases[unit.name].unit, HeadUnit)


@every_case
def test_full_rank_factors_give_the_dense_logits(case: Case):
    """Every unit at its full rank, one cover of the matrices at a time."""
    singles = {unit.name: unit.max_rank for unit in case.units if len(unit.members) == 1}
    stacks = {unit.name: unit.max_rank for unit in case.units if len(unit.members) > 1 and not isinstance(unit, HeadUnit)}
    heads = {unit.name: unit.max_rank for unit in case.units if isinstance(unit, HeadUnit)}
    dense = logits(case.handle)
    for ranks in (singles, stacks, heads):
        layers = low_rank_layers(case.handle, case.bases, ranks)
        with swap_layers(case.handle, layers):
            assert sum(isinstance(module, CompressedModule) for module in case.handle.module.modules()) == len(layers)
            torch.testing.assert_close(logits(case.handle), dense, rtol=1e-4, atol=1e-4)


@every_case
def test_compressing_leaves_the_given_model_alone(case: Case):
    before, weights = logits(case.handle), {name: p.clone() for name, p in case.handle.module.named_parameters()}
    model = compress(case.handle, case.bases, case.allocation(0.5))
    assert not torch.allclose(logits(model.handle), before)
    assert torch.equal(logits(case.handle), before)
    assert {name for name, _ in case.handle.module.named_parameters()} == set(weights)
    for name, parameter in case.handle.module.named_parameters():
        assert torch.equal(parameter, weights[name])
    shared = {p.data_ptr() for p in case.handle.module.parameters()} & {p.data_ptr() for p in model.handle.module.parameters()}
    assert not shared


@every_case
def test_a_compressed_model_can_be_trained(case: Case):
    """Healing comes after: its parameters take gradients as the dense ones do."""
    model = copy.deepcopy(case.model.handle.module)
    model.requires_grad_(True)(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_case
def test_a_trials_swap_measures_what_the_compressed_model_is(case: Case):
    """A trial stores plain factors: the same function as the pivoted form, up to rounding."""
    allocation = case.allocation(0.3)
    model = compress(case.handle, case.bases, allocation)
    layers = low_rank_layers(case.handle, case.bases, allocation.ranks, storage="factored")
    assert not any("Pivoted" in type(layer).__name__ for layer in layers.values())
    with swap_layers(case.handle, layers):
        inside = logits(case.handle)
    exact = case.config.storage == "factored"
    torch.testing.assert_close(inside, logits(model.handle), rtol=1e-6 if exact else 1e-4, atol=1e-6 if exact else 1e-4)


@every_case
def test_swapped_layers_come_back_after_a_failure(case: Case):
    before = dict(case.handle.module.named_modules())
    layers = low_rank_layers(case.handle, case.bases, case.allocation(0.3).ranks)

    def fail() -> None:
        with swap_layers(case.handle, layers):
            raise ValueError("in the middle of a trial")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert dict(case.handle.module.named_modules()) == before


@pytest.mark.parametrize(("any_handle", "case"), [("llama", "alternatives")], indirect=True, scope="module")
def test_a_trial_builds_the_layers_whose_rank_changed(case: Case, statistics: LayerStatistics):
    decomposed = Decomposed(case.handle, statistics, case.config, case.units, case.bases)
    ranks = dict(case.allocation(0.3).ranks)
    changed = next(name for name, rank in ranks.items() if rank is not None and rank > 1)

    def layers(of: Ranks) -> dict[str, nn.Module]:
        expected = swapped_at(case, of)
        with decomposed.swapped(of):
            assert torch.equal(logits(case.handle), expected)
            return {member.name: case.handle.module.get_submodule(member.name) for unit in case.units for member in unit.members}

    first, same, other = layers(ranks), layers(ranks), layers({**ranks, changed: ranks[changed] - 1})
    assert all(first[name] is same[name] for name in first)
    members = {member.name for unit in case.units if unit.name == changed for member in unit.members}
    assert {name for name in first if first[name] is not other[name]} == members


def swapped_at(case: Case, ranks: Ranks) -> Tensor:
    """Return the logits of the model with layers that were all built again."""
    with swap_layers(case.handle, low_rank_layers(case.handle, case.bases, ranks, storage="factored")):
        return logits(case.handle)


# --- one architecture is enough --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(llama: ModelHandle, windows: WindowSet) -> LayerStatistics:
    return collect_statistics(llama, windows, CalibrationConfig(group_size=40))


def built(llama: ModelHandle, measured: LayerStatistics, config: CompressionConfig, ranks: Mapping[str, int | None]) -> CompressedModel:
    units = units_of(llama, config)
    return compress(llama, factorize(llama, measured, units, config), allocation_from_ranks("manual", units, ranks))


def test_tied_embeddings_stay_tied(llama: ModelHandle, measured: LayerStatistics):
    module = built(llama, measured, CONFIGS["pivoted stacks across layers"], {}).handle.module
    assert module.get_input_embeddings().weight is module.get_output_embeddings().weight
    module = built(llama, measured, CONFIGS["whitened"], {llama.layers[0].name: 3}).handle.module
    assert module.get_input_embeddings().weight is module.get_output_embeddings().weight


def test_more_rank_never_measures_worse_on_the_calibration_features(llama: ModelHandle, measured: LayerStatistics):
    config = CONFIGS["pooled_feature"]
    bases = factorize(llama, measured, units_of(llama, config), config)
    last = llama.layers[-1].name  # nothing is compressed before it: its error is that of the basis
    dense, gaps = logits(llama), []
    for rank in (4, 12, 24, 32):
        with swap_layers(llama, low_rank_layers(llama, bases, {last: rank})):
            gaps.append(float((logits(llama) - dense).square().mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 100 * gaps[-1]


def test_the_error_of_a_layer_in_the_model_is_the_reported_one(llama: ModelHandle, measured: LayerStatistics, windows: WindowSet):
    """Of its outputs, over the calibration tokens, in the float32 that the model runs in."""
    config = CONFIGS["pooled_feature"]
    bases = factorize(llama, measured, units_of(llama, config), config)
    name = llama.layers[-1].name
    outputs: list[Tensor] = []

    def run() -> Tensor:
        hook = llama.module.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output.double().flatten(0, 1)))
        try:
            with torch.inference_mode():
                llama.module(input_ids=windows.ids, use_cache=False)
        finally:
            hook.remove()
        return outputs.pop()

    dense = run()
    for rank in (2, 8, 16):
        with swap_layers(llama, low_rank_layers(llama, bases, {name: rank})):
            error = (run() - dense).square().sum() / (len(dense) - 1)
        assert float(error) == pytest.approx(float(bases[name].errors[rank]), rel=1e-3)


def test_conv1d_is_read_the_right_way_round(any_handle: ModelHandle, statistics: LayerStatistics):
    for shape in any_handle.shapes:
        given = operand_of(any_handle, statistics, shape)
        assert given.weight.dtype == torch.float64
        assert given.weight.shape == (shape.d_out, shape.d_in)
        assert torch.equal(given.weight, weight_of(any_handle.module.get_submodule(shape.name)).double())
        assert (given.bias is not None) == shape.bias
        assert given.inputs.width == shape.d_in
        assert given.outputs is not None
        assert given.outputs.width == shape.d_out


def test_decomposing_tells_its_progress(llama: ModelHandle, measured: LayerStatistics):
    config = CONFIGS["shared_input"]
    units = units_of(llama, config)
    seen: list[tuple[int, int]] = []
    factorize(llama, measured, units, config, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(units)) for done in range(1, len(units) + 1)]


@pytest.mark.parametrize("basis", ["two_sided", "fisher_rows", "shared_input:two_sided_half"])
def test_a_basis_that_needs_gradients_says_so(basis: str, llama: ModelHandle, measured: LayerStatistics):
    config = CompressionConfig(basis=basis)
    with pytest.raises(ConfigError, match="by their gradients, which were not collected"):
        factorize(llama, measured, units_of(llama, config), config)


def test_damping_is_that_of_the_config(llama: ModelHandle, measured: LayerStatistics):
    name = llama.layers[0].name
    units = [unit for unit in units_of(llama, CONFIGS["whitened"]) if unit.name == name]
    small, large = (
        factorize(llama, measured, units, CompressionConfig(basis="whitened", input_damping=damping))[name].damping
        for damping in (1e-6, 1e-2)
    )
    assert large == pytest.approx(1e4 * small)


def test_gradient_damping_is_that_of_the_config(llama: ModelHandle, measured: LayerStatistics, windows: WindowSet):
    """A heavy one makes all outputs equal: two_sided is then pooled_feature (one group, so its covariance is the plain one)."""
    statistics = measured.with_outputs(collect_gradients(llama, windows, measured.config))
    units = units_of(llama, CONFIGS["two_sided"])[:1]

    def product(config: CompressionConfig) -> Tensor:
        factors = factorize(llama, statistics, units, config)[units[0].name].slice(6)
        assert isinstance(factors, Factors)
        return factors.ups[0] @ factors.down

    plain = product(CompressionConfig(basis="pooled_feature"))
    light, heavy = (product(CompressionConfig(basis="two_sided", gradient_damping=damping)) for damping in (1e-3, 1e9))
    torch.testing.assert_close(heavy, plain, rtol=1e-5, atol=1e-5)
    assert (light - plain).abs().max() > 1e-2


def test_factors_that_overflow_the_dtype_name_the_layer(llama: ModelHandle, measured: LayerStatistics):
    name = llama.layers[0].name
    half = copy.copy(llama)
    object.__setattr__(half, "module", copy.deepcopy(llama.module).to(torch.float16))
    config = CONFIGS["weight_svd"]
    units = [unit for unit in units_of(llama, config) if unit.name == name]
    bases = factorize(llama, measured, units, config)
    bases[name].down.mul_(1e9)
    with pytest.raises(NumericalError, match=rf"{name}: its factors overflow in torch.float16"):
        low_rank_layers(half, bases, {name: 3})


def test_ranks_that_do_not_fit_are_refused(llama: ModelHandle, measured: LayerStatistics):
    with pytest.raises(ConfigError, match="no compressible layer"):
        low_rank_layers(llama, {}, {"lm_head": 3})
    config = CONFIGS["weight_svd"]
    name = llama.layers[0].name
    bases = factorize(llama, measured, [unit for unit in units_of(llama, config) if unit.name == name], config)
    with pytest.raises(RankError, match=rf"{name}: rank must be in"):
        low_rank_layers(llama, bases, {name: 33})


def test_a_compressed_model_offers_only_its_dense_layers(llama: ModelHandle, measured: LayerStatistics):
    chosen = llama.layers[0].name
    smaller = built(llama, measured, CONFIGS["weight_svd"], {chosen: 3}).handle
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in llama.layers if layer.name != chosen]


def test_matrices_of_a_stack_are_no_longer_offered(llama: ModelHandle, measured: LayerStatistics):
    config = CompressionConfig(basis="shared_input", value_dense=False)
    stack = next(unit for unit in units_of(llama, config) if len(unit.members) == 3)
    smaller = built(llama, measured, config, {stack.name: 4}).handle
    assert len(smaller.layers) == len(llama.layers) - 3

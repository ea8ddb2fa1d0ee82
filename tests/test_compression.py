import copy

import pytest
import torch

from lowrank_core.accounting import allocated_parameters
from lowrank_core.allocation import allocate, allocation_from_ranks
from lowrank_core.bases import BASES, FactorBasis, factorize, priced_shapes
from lowrank_core.calibration import LayerStatistics, collect_statistics
from lowrank_core.compression import compress, low_rank_layers, swapped
from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import ConfigError
from lowrank_core.models import LowRankLinear, ModelHandle
from lowrank_core.text import WindowSet

IDS = torch.tensor([[0, 5, 9, 44, 120, 7, 80, 3]])


@pytest.fixture(scope="module")
def statistics(any_handle: ModelHandle, windows: WindowSet) -> LayerStatistics:
    return collect_statistics(any_handle, windows, CalibrationConfig(group_size=8))


@pytest.fixture(scope="module", params=list(BASES))
def case(
    request: pytest.FixtureRequest, any_handle: ModelHandle, statistics: LayerStatistics
) -> tuple[str, ModelHandle, dict[str, FactorBasis]]:
    return request.param, any_handle, factorize(any_handle, statistics, request.param)


def logits(handle: ModelHandle) -> torch.Tensor:
    with torch.inference_mode():
        return handle.module(input_ids=IDS, use_cache=False).logits


def test_counted_parameters_are_those_of_the_built_model(case: tuple[str, ModelHandle, dict[str, FactorBasis]]) -> None:
    name, handle, bases = case
    shapes = priced_shapes(handle, name)
    allocation = allocate("uniform", shapes, 0.4)
    model = compress(handle, bases, allocation)
    built = sum(p.numel() for p in model.handle.module.parameters())
    assert model.report.parameters_after == built
    assert model.report.linear_parameters_after == allocation.parameters == allocated_parameters(shapes, allocation.ranks)
    assert model.report.parameters_before - built == allocation.dense_parameters - allocation.parameters
    assert model.report.compression_ratio == pytest.approx(0.4, abs=0.02)
    assert model.report.compression_ratio >= 0.4
    assert model.report.bytes_after == 4 * built  # the tiny checkpoints are stored in float32


def test_full_rank_factors_give_the_dense_logits(case: tuple[str, ModelHandle, dict[str, FactorBasis]]) -> None:
    _, handle, bases = case
    layers = low_rank_layers(handle, bases, {name: basis.max_rank for name, basis in bases.items()})
    dense = logits(handle)
    with swapped(handle, layers):
        assert sum(isinstance(m, LowRankLinear) for m in handle.module.modules()) == len(bases)
        torch.testing.assert_close(logits(handle), dense, rtol=1e-4, atol=1e-4)


def test_compressing_leaves_the_given_model_alone(case: tuple[str, ModelHandle, dict[str, FactorBasis]]) -> None:
    name, handle, bases = case
    before, weights = logits(handle), {n: p.clone() for n, p in handle.module.named_parameters()}
    model = compress(handle, bases, allocate("uniform", priced_shapes(handle, name), 0.5))
    assert not torch.allclose(logits(model.handle), before)
    assert torch.equal(logits(handle), before)
    for parameter_name, parameter in handle.module.named_parameters():
        assert torch.equal(parameter, weights[parameter_name])
    shared = {p.data_ptr() for p in handle.module.parameters()} & {p.data_ptr() for p in model.handle.module.parameters()}
    assert not shared


def test_a_trial_s_swap_measures_what_the_compressed_model_is(case: tuple[str, ModelHandle, dict[str, FactorBasis]]) -> None:
    name, handle, bases = case
    allocation = allocate("uniform", priced_shapes(handle, name), 0.3)
    model = compress(handle, bases, allocation)
    with swapped(handle, low_rank_layers(handle, bases, allocation.ranks)):
        inside = logits(handle)
    torch.testing.assert_close(inside, logits(model.handle), rtol=1e-6, atol=1e-6)


def test_swapped_layers_come_back_after_a_failure(case: tuple[str, ModelHandle, dict[str, FactorBasis]]) -> None:
    _, handle, bases = case
    before = {name: handle.module.get_submodule(name) for name in bases}

    def fail() -> None:
        with swapped(handle, low_rank_layers(handle, bases, dict.fromkeys(bases, 2))):
            raise ValueError("in the middle of a trial")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert all(handle.module.get_submodule(name) is module for name, module in before.items())


def test_tied_embeddings_stay_tied(llama: ModelHandle, windows: WindowSet) -> None:
    bases = factorize(llama, collect_statistics(llama, windows, CalibrationConfig()), "pooled_feature")
    module = compress(llama, bases, allocate("uniform", priced_shapes(llama, "pooled_feature"), 0.3)).handle.module
    assert module.get_input_embeddings().weight is module.get_output_embeddings().weight


def test_more_rank_never_measures_worse_on_the_calibration_features(llama: ModelHandle, windows: WindowSet) -> None:
    bases = factorize(llama, collect_statistics(llama, windows, CalibrationConfig(group_size=40)), "pooled_feature")
    last = llama.layers[-1].name  # nothing is compressed before it: its error is that of the basis
    dense, gaps = logits(llama), []
    for rank in (4, 12, 24, 32):
        with swapped(llama, low_rank_layers(llama, bases, {last: rank})):
            gaps.append(float((logits(llama) - dense).square().mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 100 * gaps[-1]


def test_a_rank_without_a_basis_is_refused(llama: ModelHandle) -> None:
    with pytest.raises(ConfigError, match="no compressible layer"):
        low_rank_layers(llama, {}, {"lm_head": 3})


def test_a_compressed_model_offers_only_its_dense_layers(llama: ModelHandle, windows: WindowSet) -> None:
    shapes = priced_shapes(llama, "weight_svd")
    bases = factorize(llama, collect_statistics(llama, windows, CalibrationConfig()), "weight_svd")
    chosen = shapes[0].name
    smaller = compress(copy.copy(llama), bases, allocation_from_ranks("manual", shapes, {chosen: 3})).handle
    assert chosen not in {layer.name for layer in smaller.layers}
    assert len(smaller.layers) == len(llama.layers) - 1

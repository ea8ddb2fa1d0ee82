"""Measured slopes: errors in any unit become what they cost the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowrank_core.compression.build import low_rank_layers
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.compression.error_weights import measure_error_weights
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.errors import ConfigError, NumericalError
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import weight_of
from lowrank_core.statistics.calibration import LayerStatistics, collect_statistics
from lowrank_core.text import WindowSet

RATIO = 0.4
RAW = CompressionConfig(basis="whitened", storage="factored", value_dense=False)


@pytest.fixture(scope="module")
def statistics(llama: ModelHandle, windows: WindowSet) -> LayerStatistics:
    return collect_statistics(llama, windows, CalibrationConfig(group_size=8))


@pytest.fixture(scope="module")
def raw(llama: ModelHandle, statistics: LayerStatistics) -> Decomposed:
    return decompose(llama, statistics, RAW)


@pytest.fixture(scope="module")
def few(windows: WindowSet) -> WindowSet:
    return windows.first(12)


@pytest.fixture(scope="module")
def dense(llama: ModelHandle, few: WindowSet) -> DenseReference:
    return DenseReference.compute(llama, few, batch_size=8)


@pytest.fixture(scope="module")
def measured(raw: Decomposed, few: WindowSet, dense: DenseReference) -> dict[str, float]:
    return measure_error_weights(raw, few, dense, compression_ratio=RATIO)


def scaled(decomposed: Decomposed, factors: dict[str, float]) -> Decomposed:
    """Return the same with the errors of some units in another unit."""
    bases = {name: replace(basis, errors=basis.errors * factors.get(name, 1.0)) for name, basis in decomposed.bases.items()}
    return replace(decomposed, bases=bases)


def kl_of(decomposed: Decomposed, windows: WindowSet, dense: DenseReference, ranks: dict[str, int | None]) -> float:
    with decomposed.swapped(ranks):
        scores, _ = score_windows(decomposed.handle, windows, batch_size=8, dense=dense)
    assert scores.kl is not None
    return float(scores.kl.mean())


def test_a_slope_is_the_divergence_of_one_unit_over_its_error(
    raw: Decomposed, few: WindowSet, dense: DenseReference, measured: dict[str, float]
):
    before = raw.handle.fingerprint
    assert set(measured) == {unit.name for unit in raw.units}
    ranks = raw.allocate("uniform", RATIO).ranks
    for unit in raw.units[:4]:
        rank = unit.rank_for_parameters((1 - RATIO) * unit.dense_parameters)
        assert rank is not None
        assert abs(rank - (ranks[unit.name] or 99)) <= 1
        expected = kl_of(raw, few, dense, {unit.name: rank}) / float(raw.bases[unit.name].errors[rank])
        assert measured[unit.name] == pytest.approx(expected, rel=1e-9)
    assert replace(raw.handle).fingerprint == before


def test_the_unit_of_a_unit_s_errors_cancels(raw: Decomposed, few: WindowSet, dense: DenseReference, measured: dict[str, float]):
    """Errors c times as large have slopes c times as small: the same allocation, where the raw errors give another."""
    factors = {unit.name: 16.0 ** (index % 4 - 1) for index, unit in enumerate(raw.units)}
    other = scaled(raw, factors)
    again = measure_error_weights(other, few, dense, compression_ratio=RATIO)
    assert again == {name: pytest.approx(slope / factors[name], rel=1e-12) for name, slope in measured.items()}
    result = raw.allocate("lagrangian", RATIO, weights=measured)
    assert other.allocate("lagrangian", RATIO, weights=again) == result
    assert other.allocate("lagrangian", RATIO).ranks != raw.allocate("lagrangian", RATIO).ranks


def test_slopes_mend_errors_in_units_of_their_own(raw: Decomposed, few: WindowSet, dense: DenseReference):
    """On the validation text itself: what is lost by trading incomparable errors is won back."""
    other = scaled(raw, {unit.name: 16.0 ** (index % 4 - 1) for index, unit in enumerate(raw.units)})
    slopes_of_it = measure_error_weights(other, few, dense, compression_ratio=RATIO)
    plain = kl_of(other, few, dense, dict(other.allocate("lagrangian", RATIO).ranks))
    weighted = kl_of(other, few, dense, dict(other.allocate("lagrangian", RATIO, weights=slopes_of_it).ranks))
    assert weighted < plain


def test_alternatives_are_measured_and_locks_are_not(
    llama: ModelHandle, statistics: LayerStatistics, few: WindowSet, dense: DenseReference
):
    config = replace(RAW, stacks=True, heads=True)
    decomposed = decompose(llama, statistics, config)
    seen: list[tuple[int, int]] = []
    locked = "model.layers.0.self_attn.q_proj"
    result = measure_error_weights(
        decomposed, few, dense, compression_ratio=RATIO, fixed={locked: 5}, progress=lambda *counts: seen.append(counts)
    )
    names = {unit.name for unit in decomposed.units}
    assert names - set(result) == {name for name in names if locked in name.split("+")}
    assert any("+" in name for name in result)
    assert all(slope > 0 for slope in result.values())
    assert seen == [(done, len(result)) for done in range(1, len(result) + 1)]
    allocation = decomposed.allocate("lagrangian", RATIO, fixed={locked: 5}, weights=result)
    assert allocation.ranks[locked] == 5
    with pytest.raises(ConfigError, match="no compressible layer"):
        measure_error_weights(decomposed, few, dense, compression_ratio=RATIO, fixed={"z": 5})


def test_what_loses_nothing_is_measured_where_it_loses_something(raw: Decomposed, few: WindowSet, dense: DenseReference):
    """Rank 2 of a matrix of rank 2 has no slope; rank 1 has. A matrix of zeros has none at all, and nothing to weigh."""
    first, second = raw.units[0].name, raw.units[1].name
    errors = raw.bases[first].errors.clone()
    errors[2:] = errors[0] * 1e-17
    bases = {
        **raw.bases,
        first: replace(raw.bases[first], errors=errors),
        second: replace(raw.bases[second], errors=torch.zeros_like(raw.bases[second].errors)),
    }
    result = measure_error_weights(replace(raw, bases=bases), few, dense, compression_ratio=RATIO)
    assert result[first] == pytest.approx(kl_of(raw, few, dense, {first: 1}) / float(errors[1]), rel=1e-9)
    assert result[second] == 1.0


def test_a_slope_is_positive_where_rounding_says_it_is_not(
    raw: Decomposed, few: WindowSet, dense: DenseReference, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lowrank_core.compression.decomposed.low_rank_layers", lambda *_, **__: {})  # nothing is swapped: KL is rounding
    assert all(slope > 0 for slope in measure_error_weights(raw, few, dense, compression_ratio=RATIO).values())


def test_a_unit_that_makes_the_model_diverge_is_named(
    raw: Decomposed, few: WindowSet, dense: DenseReference, monkeypatch: pytest.MonkeyPatch
):
    def broken(*arguments: object, **options: object) -> dict[str, torch.nn.Module]:
        layers = low_rank_layers(*arguments, **options)  # type: ignore[arg-type]
        for layer in layers.values():
            for parameter in layer.parameters():
                parameter.data.fill_(torch.nan)
        return layers

    monkeypatch.setattr("lowrank_core.compression.decomposed.low_rank_layers", broken)
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj at rank \d+, everything else dense: .*diverged"):
        measure_error_weights(raw, few, dense, compression_ratio=RATIO)
    assert torch.isfinite(weight_of(raw.handle.module.get_submodule("model.layers.0.self_attn.q_proj"))).all()


def test_weights_take_the_warning_away(raw: Decomposed):
    assert "measures each in its own unit" in raw.warnings("lagrangian")[0]
    assert raw.warnings("lagrangian", weighted=True) == ()
    for rule in ("energy", "threshold", "svd_llm_v2", "block_influence", "uniform"):
        assert raw.warnings(rule) == ()


def test_every_rule_allocates_from_what_a_decomposed_model_knows(raw: Decomposed, statistics: LayerStatistics):
    for rule in ("uniform", "lord_manual", "energy", "threshold", "svd_llm_v2", "block_influence", "lagrangian"):
        result = raw.allocate(rule, RATIO, fixed={raw.units[0].name: 3})
        assert result.ranks[raw.units[0].name] == 3
        assert result.compression_ratio == pytest.approx(RATIO, abs=0.01)
    old = replace(raw, statistics=replace(statistics, influence=()))
    with pytest.raises(ConfigError, match="Calibrate again"):
        old.allocate("block_influence", RATIO)
    eights = replace(raw, config=replace(RAW, rank_multiple=8)).allocate("uniform", RATIO, fixed={raw.units[0].name: 3})
    assert eights.ranks[raw.units[0].name] == 3
    assert all(rank is None or rank == 3 or rank < 8 or rank % 8 == 0 for rank in eights.ranks.values())

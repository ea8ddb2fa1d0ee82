"""Factors on disk: those in memory up to float32, mapped unit by unit, resumed block by block, and never believed when damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupting import stopping_after

from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig
from lowrank_core.decomposition import store
from lowrank_core.decomposition.factorization import FactorBasis
from lowrank_core.decomposition.store import StoredBases, cached_bases
from lowrank_core.decomposition.units import factorize, units_of
from lowrank_core.errors import Cancelled, ModelError, NumericalError
from lowrank_core.models import ModelHandle
from lowrank_core.statistics.calibration import LayerStatistics, cached_statistics
from lowrank_core.statistics.gradients import cached_gradients
from lowrank_core.text import WindowSet

STUDIO = CompressionConfig(basis="two_sided", storage="pivoted", value_dense=False, stacks=True, heads=True)
PLAIN = CompressionConfig(basis="whitened", storage="factored", value_dense=False)


def measured(handle: ModelHandle, windows: WindowSet, folder: Path) -> LayerStatistics:
    config = CalibrationConfig()
    inputs, _ = cached_statistics(handle, windows, config, folder / "statistics")
    return inputs.with_outputs(cached_gradients(handle, windows, config, folder / "statistics"))


@pytest.fixture
def statistics(any_handle: ModelHandle, windows: WindowSet, tmp_path: Path) -> LayerStatistics:
    return measured(any_handle, windows, tmp_path)


@pytest.fixture
def llama_statistics(llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> LayerStatistics:
    return measured(llama, windows, tmp_path)


def kept(handle: ModelHandle, statistics: LayerStatistics, config: CompressionConfig, folder: Path, **options: object) -> StoredBases:
    return cached_bases(handle, statistics, units_of(handle, config), config, folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [STUDIO, PLAIN, replace(PLAIN, basis="cross_layer")], ids=lambda config: config.basis)
def test_what_is_kept_is_what_was_decomposed(
    config: CompressionConfig, any_handle: ModelHandle, statistics: LayerStatistics, tmp_path: Path
):
    expected = factorize(any_handle, statistics, units_of(any_handle, config), config)
    result = kept(any_handle, statistics, config, tmp_path)
    assert list(result) == list(expected)
    for name, basis in expected.items():
        stored = result[name]
        assert stored.unit == basis.unit
        assert torch.equal(stored.errors, basis.errors)
        assert (stored.damping, stored.condition) == (basis.damping, basis.condition)
        rank = max(1, basis.max_rank // 2)
        one, other = stored.slice(rank), basis.slice(rank)
        if isinstance(basis, FactorBasis):
            assert one.down.dtype == torch.float64
            for up, dense in zip(one.ups, other.ups, strict=True):
                torch.testing.assert_close(up @ one.down, dense @ other.down, rtol=1e-5, atol=1e-6)
            assert [bias is None for bias in one.biases] == [bias is None for bias in other.biases]
        else:
            torch.testing.assert_close(one.values, other.values, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(one.outputs, other.outputs, rtol=1e-6, atol=1e-6)


def test_a_second_time_nothing_is_decomposed(
    llama: ModelHandle, llama_statistics: LayerStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = decompose(llama, llama_statistics, STUDIO, store=tmp_path)
    monkeypatch.setattr(store, "factorized", None)
    again = decompose(llama, llama_statistics, replace(STUDIO, storage="factored", rank_multiple=8), store=tmp_path)
    assert {name: curve.tolist() for name, curve in again.curves.items()} == {name: curve.tolist() for name, curve in first.curves.items()}
    assert len(list(tmp_path.glob("factors-*"))) == 1


@pytest.mark.parametrize("change", [{"input_damping": 1e-3}, {"gradient_damping": 0.1}, {"heads": False}, {"basis": "whitened"}])
def test_other_settings_have_factors_of_their_own(
    change: dict[str, object], llama: ModelHandle, llama_statistics: LayerStatistics, tmp_path: Path
):
    for config in (STUDIO, replace(STUDIO, **change)):  # type: ignore[arg-type]
        kept(llama, llama_statistics, config, tmp_path)
    assert len(list(tmp_path.glob("factors-*"))) == 1 + (change != {"heads": False} or bool(_heads(llama)))


def _heads(handle: ModelHandle) -> bool:
    return len(units_of(handle, STUDIO)) > len(units_of(handle, replace(STUDIO, heads=False)))


def test_an_interrupted_decomposition_goes_on(llama: ModelHandle, llama_statistics: LayerStatistics, tmp_path: Path):
    units = units_of(llama, PLAIN)
    first = sum(unit.members[0].depth == 0 for unit in units)
    with pytest.raises(Cancelled):
        kept(llama, llama_statistics, PLAIN, tmp_path, progress=stopping_after(first))
    (folder,) = tmp_path.glob("factors-*")
    assert [path.name for path in (folder / "factors").iterdir()] == ["block-000.safetensors"]
    steps: list[tuple[int, int]] = []
    kept(llama, llama_statistics, PLAIN, tmp_path, progress=lambda *step: steps.append(step))
    assert steps[0] == (first, len(units))
    assert steps[-1] == (len(units), len(units))


def test_damage_is_told(llama: ModelHandle, llama_statistics: LayerStatistics, tmp_path: Path):
    kept(llama, llama_statistics, PLAIN, tmp_path)
    (folder,) = tmp_path.glob("factors-*")
    path = folder / "factors" / "block-000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(NumericalError, match=r"factors-.* damaged .*Delete that folder"):
        kept(llama, llama_statistics, PLAIN, tmp_path)


def test_a_full_disk_is_told_before_it_is_written(
    llama: ModelHandle, llama_statistics: LayerStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = type("usage", (), {"free": 10})
    monkeypatch.setattr(store, "disk_usage", lambda folder: free)
    with pytest.raises(ModelError, match=r"10 bytes are free\. Make room"):
        kept(llama, llama_statistics, PLAIN, tmp_path)
    assert not list(tmp_path.glob("factors-*/factors/*"))

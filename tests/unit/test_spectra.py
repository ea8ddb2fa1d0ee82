from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import RunError
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import weight_of
from lowrank_core.parameters import MatrixShape
from lowrank_core.spectra.spectrum import (
    LayerSpectrum,
    effective_rank,
    load_spectra,
    participation_ratio,
    rank_for_energy,
    retained_energy,
    save_spectra,
    stable_rank,
)
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.statistics.spectra import shuffled, spectra_of
from lowrank_core.text import WindowSet

energies = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e6)).map(lambda e: np.sort(e)[::-1].copy())


@pytest.mark.parametrize("count", [1, 3, 50])
def test_equal_energies_count_as_many_directions(count: int) -> None:
    flat = np.full(count, 2.5)
    assert effective_rank(flat) == pytest.approx(count)
    assert stable_rank(flat) == pytest.approx(count)
    assert participation_ratio(flat) == pytest.approx(count)


def test_one_direction_counts_as_one() -> None:
    single = np.array([4.0, 0, 0])
    assert effective_rank(single) == pytest.approx(1)
    assert stable_rank(single) == 1
    assert participation_ratio(single) == 1
    assert rank_for_energy(single, 0.99) == 1


def test_known_values() -> None:
    values = np.array([3.0, 1.0])
    assert stable_rank(values) == pytest.approx(4 / 3)
    assert participation_ratio(values) == pytest.approx(16 / 10)
    assert effective_rank(values) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert rank_for_energy(values, 0.75) == 1
    assert rank_for_energy(values, 0.76) == 2


@given(energies)
def test_measures_stay_in_their_range_and_finite(values: np.ndarray) -> None:
    for measure in (effective_rank, stable_rank, participation_ratio):
        result = measure(values)
        assert np.isfinite(result)
        assert 0 <= result <= len(values) * (1 + 1e-9)
    assert np.isfinite(retained_energy(values)).all()


@given(energies, st.floats(0.01, 0.999))
def test_the_rank_for_an_energy_is_the_smallest(values: np.ndarray, share: float) -> None:
    rank = rank_for_energy(values, share)
    if rank == 0:
        assert not values.any()
        return
    kept = retained_energy(values)
    assert kept[rank - 1] >= share - 1e-9
    assert rank == 1 or kept[rank - 2] < share


def test_spectra_survive_a_file(tmp_path: Path) -> None:
    shape = MatrixShape("model.layers.0.q_proj", "q_proj", 0, 4, 6, bias=True)
    spectrum = LayerSpectrum(shape, np.array([3.0, 2, 1, 0]), np.array([9.0, 4, 1, 0]), np.array([8.0, 4, 1, 0]), np.arange(6.0)[::-1])
    save_spectra(tmp_path / "spectra.npz", [spectrum])
    (result,) = load_spectra(tmp_path / "spectra.npz")
    assert result.shape == shape
    np.testing.assert_array_equal(result.weight_energy, spectrum.weight_energy)
    np.testing.assert_array_equal(result.input_eigenvalues, spectrum.input_eigenvalues)


def test_a_file_without_shuffled_matrices_is_still_read_and_a_later_one_is_refused(tmp_path: Path) -> None:
    values = np.array([2.0, 1.0])
    spectrum = LayerSpectrum(MatrixShape("a", "q", 0, 2, 2), values, values, values, values, shuffled_singular_values=values[::-1])
    path = tmp_path / "spectra.npz"
    save_spectra(path, [spectrum])
    assert load_spectra(path)[0].shuffled_singular_values is not None
    with np.load(path) as archive:
        stored = {name: array for name, array in archive.items() if name != "sha256"}
    old = {name: array for name, array in stored.items() if name != "format" and "shuffled" not in name}
    np.savez(path, **old)
    (result,) = load_spectra(path)
    assert result.shuffled_singular_values is None
    np.testing.assert_array_equal(result.weight_singular_values, values)
    np.savez(path, **{**stored, "format": np.array(99)})
    with pytest.raises(RunError, match="written by a later version"):
        load_spectra(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x80\x04cos\nsystem\n"])
def test_a_damaged_file_is_told_and_nothing_is_unpickled(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spectra.npz").write_bytes(content)
    with pytest.raises(RunError, match="can't be read"):
        load_spectra(tmp_path / "spectra.npz")


def test_spectra_of_a_model_are_those_of_its_weights_and_outputs(any_handle: ModelHandle, windows: WindowSet) -> None:
    statistics = collect_statistics(any_handle, windows, CalibrationConfig(group_size=8))
    spectra = spectra_of(any_handle, statistics)
    assert [s.shape for s in spectra] == list(any_handle.shapes)
    layer, spectrum = any_handle.layers[-1], spectra[-1]
    weight = weight_of(any_handle.module.get_submodule(layer.name)).double()
    np.testing.assert_allclose(spectrum.weight_singular_values, np.linalg.svd(weight.numpy(), compute_uv=False), rtol=1e-9, atol=1e-12)
    sample = statistics.inputs[layer.input_group].sample
    expected = np.linalg.eigvalsh((weight @ sample @ weight.T).numpy())[::-1][: min(weight.shape)]
    np.testing.assert_allclose(spectrum.feature_eigenvalues_sample, expected, rtol=1e-7, atol=1e-10)


def test_a_shuffled_matrix_has_the_same_entries_the_same_way_each_time() -> None:
    weight = torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 61.0))  # of rank one: shuffling ends that
    mixed = shuffled(weight)
    torch.testing.assert_close(mixed.flatten().sort().values, weight.flatten().sort().values)
    torch.testing.assert_close(shuffled(weight), mixed)
    assert torch.linalg.matrix_rank(mixed) == 40


def test_the_shuffled_matrix_is_measured_with_the_spectra(llama: ModelHandle, windows: WindowSet) -> None:
    statistics = collect_statistics(llama, windows, CalibrationConfig(group_size=8))
    spectrum = spectra_of(llama, statistics)[0]
    weight = weight_of(llama.module.get_submodule(llama.layers[0].name)).detach()
    assert spectrum.shuffled_singular_values is not None
    np.testing.assert_allclose(spectrum.shuffled_singular_values, torch.linalg.svdvals(shuffled(weight)).numpy(), rtol=1e-5)
    assert (spectrum.shuffled_singular_values**2).sum() == pytest.approx(spectrum.weight_energy.sum(), rel=1e-5)

"""Statistics and other numbers on disk: what was damaged, swapped or comes from elsewhere is named in a line, and never believed."""

from __future__ import annotations

import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from priced import single
from safetensors.torch import save_file

from lowrank_core.allocation.curves import CurveRecord, load_curves, save_curves
from lowrank_core.config import CalibrationConfig
from lowrank_core.errors import Cancelled, NumericalError, RunError
from lowrank_core.healing.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from lowrank_core.models import ModelHandle
from lowrank_core.parameters import MatrixShape
from lowrank_core.runs import bundled_path
from lowrank_core.spectra.spectrum import LayerSpectrum, load_spectra, save_spectra
from lowrank_core.statistics.calibration import cached_statistics
from lowrank_core.statistics.gradients import cached_gradients
from lowrank_core.text import WindowSet

CONFIG = CalibrationConfig(group_size=8, batch_size=5, gradient_windows=8)
FIRST, SECOND = "block-000.safetensors", "block-001.safetensors"


def _zero(part: Path) -> None:
    """Four kilobytes of zeros in the middle of the data, as a bad sector leaves them."""
    with (part / FIRST).open("r+b") as stream:
        stream.seek((part / FIRST).stat().st_size // 2)
        stream.write(bytes(4096))


def _flip(part: Path) -> None:
    content = bytearray((part / FIRST).read_bytes())
    content[-9] ^= 0x40  # in an exponent
    (part / FIRST).write_bytes(content)


def _flip_in_header(part: Path) -> None:
    content = bytearray((part / SECOND).read_bytes())
    content[20] ^= 0x01
    (part / SECOND).write_bytes(content)


def _swap(part: Path) -> None:
    shutil.move(part / FIRST, part / "kept")
    shutil.move(part / SECOND, part / FIRST)
    shutil.move(part / "kept", part / SECOND)


def _forget(part: Path) -> None:
    (part.parent / "checksums.json").unlink()


def _spoil_record(part: Path) -> None:
    (part.parent / "checksums.json").write_text("[1]", encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "zeros": (_zero, r"block-000\.safetensors is not what was written: its SHA-256 differs"),
    "a bit": (_flip, r"block-000\.safetensors is not what was written: its SHA-256 differs"),
    "a bit in the header": (_flip_in_header, r"block-001\.safetensors is not what was written: its SHA-256 differs"),
    "blocks swapped": (_swap, r"block-000\.safetensors is (not what was written|cut short)"),
    "no checksums": (_forget, r"block-000\.safetensors has no checksum"),
    "checksums of something else": (_spoil_record, "are damaged"),
}


@pytest.fixture(params=["inputs", "outputs"])
def stored(request: pytest.FixtureRequest, llama: ModelHandle, windows: WindowSet, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    """A folder of blocks, and what opens it."""

    def opened() -> object:
        if request.param == "outputs":
            return cached_gradients(llama, windows, CONFIG, tmp_path)
        return cached_statistics(llama, windows, CONFIG, tmp_path)[0].inputs

    opened()
    (folder,) = tmp_path.iterdir()
    return folder / request.param, opened


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_blocks_are_named_when_they_are_opened(stored: tuple[Path, Callable[[], object]], damage: str):
    part, opened = stored
    spoil, message = DAMAGE[damage]
    opened()
    spoil(part)
    with pytest.raises(NumericalError, match=message) as reported:
        opened()
    assert f"the stored statistics in {part.parent} are damaged" in str(reported.value)
    assert "Delete that folder and calibrate again" in str(reported.value)
    assert "\n" not in str(reported.value)


def test_blocks_of_other_statistics_are_not_taken(stored: tuple[Path, Callable[[], object]]):
    """A folder that was renamed, or whose files were exchanged for another one's, checksums included."""
    part, opened = stored
    folder = part.parent
    foreign = folder.with_name(folder.name.replace("-", "x-"))
    text = (folder / "checksums.json").read_text(encoding="utf-8")
    (folder / "checksums.json").write_text(text.replace(folder.name, foreign.name), encoding="utf-8")
    with pytest.raises(NumericalError, match=f"checksums.json is of {foreign.name}"):
        opened()


def _stop_after(batches: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= batches:
            raise Cancelled

    return progress


@pytest.mark.parametrize("damage", ["zeros", "a bit", "no checksums"])
def test_an_interrupted_calibration_checks_its_blocks_before_it_goes_on(
    llama: ModelHandle, windows: WindowSet, tmp_path: Path, damage: str
):
    with pytest.raises(Cancelled):
        cached_statistics(llama, windows, CONFIG, tmp_path, progress=_stop_after(12))
    spoil, message = DAMAGE[damage]
    spoil(next(tmp_path.glob("*/inputs")))
    steps: list[int] = []
    with pytest.raises(NumericalError, match=message):
        cached_statistics(llama, windows, CONFIG, tmp_path, progress=lambda done, total: steps.append(done))
    assert not steps  # told before the second block is measured


def test_an_interrupted_measurement_of_gradients_checks_its_blocks(llama: ModelHandle, windows: WindowSet, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lowrank_core.statistics.gradients._Measurement.chained", False)
    monkeypatch.setattr("lowrank_core.statistics.gradients.free_memory", lambda device: 0)  # a pass for each block
    with pytest.raises(Cancelled):
        cached_gradients(llama, windows, CONFIG, tmp_path, progress=_stop_after(3))
    _flip(next(tmp_path.glob("*/outputs")))
    with pytest.raises(NumericalError, match="SHA-256 differs"):
        cached_gradients(llama, windows, CONFIG, tmp_path)


def test_hidden_states_with_other_bits_are_not_gone_on_from(llama: ModelHandle, windows: WindowSet, tmp_path: Path):
    with pytest.raises(Cancelled):
        cached_statistics(llama, windows, CONFIG, tmp_path, progress=_stop_after(12))
    (hidden,) = tmp_path.glob("*/hidden-000.*")
    content = bytearray(hidden.read_bytes())
    content[:256] = bytes(256)
    hidden.write_bytes(content)
    with pytest.raises(NumericalError, match=r"hidden-000\.float32\.16x32 is not what was written.*Delete that folder"):
        cached_statistics(llama, windows, CONFIG, tmp_path)


def test_a_statistic_that_is_not_finite_is_damage_and_names_its_layer(llama: ModelHandle, windows: WindowSet, tmp_path: Path, monkeypatch):
    """Even with a checksum that fits: the numbers were bad when they were written."""
    good = save_file

    def bad(tensors: dict[str, torch.Tensor], *rest: object, **options: object) -> None:
        good({name: t.fill_(torch.nan) if name.endswith("q_proj/pooled") else t for name, t in tensors.items()}, *rest, **options)

    monkeypatch.setattr("lowrank_core.statistics.store.save_file", bad)
    statistics, _ = cached_statistics(llama, windows, CONFIG, tmp_path)
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj: pooled holds NaN or Inf.*Delete that folder"):
        statistics.inputs["model.layers.0.self_attn.q_proj"]
    assert statistics.inputs["model.layers.0.mlp.down_proj"].count > 0


def test_statistics_without_checksums_are_computed_again(llama: ModelHandle, windows: WindowSet, tmp_path: Path):
    """As an earlier version left them: they lie under another name, and nothing says that they are whole."""
    cached_statistics(llama, windows, CONFIG, tmp_path)
    (folder,) = tmp_path.iterdir()
    folder.rename(tmp_path / folder.name.split("-")[0])
    assert cached_statistics(llama, windows, CONFIG, tmp_path)[1] is False


# archives of a run


def _spectra(path: Path) -> None:
    values = np.linspace(3, 1, 24)
    save_spectra(path, [LayerSpectrum(MatrixShape("a.q", "q", 0, 24, 24), *[values] * 4)])


def _curves(path: Path) -> None:
    save_curves(path, CurveRecord("two_sided", "kl", {"a": np.linspace(4, 0, 40)}, (0.5,)), [single("a", 64, 64)])


ARCHIVES: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "spectra": (_spectra, load_spectra),
    "curves": (_curves, load_curves),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_whatever_byte_of_an_archive_is_hit_it_is_told_or_nothing_has_changed(name: str, tmp_path: Path):
    save, load = ARCHIVES[name]
    path = tmp_path / f"{name}.npz"
    save(path)
    whole, expected = path.read_bytes(), repr(load(path))
    dice = random.Random(0)
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        try:
            result = repr(load(path))
        except RunError as error:
            result = expected if "can't be read" in str(error) else str(error)
        assert result == expected, place


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_with_other_numbers_is_told(name: str, tmp_path: Path):
    """Zip has sums of its own; they fit what a program wrote that did not know ours."""
    save, load = ARCHIVES[name]
    path = tmp_path / f"{name}.npz"
    save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    changed = next(key for key, array in arrays.items() if array.dtype.kind == "f")
    arrays[changed] = np.where(np.arange(arrays[changed].size) == 1, 0, arrays[changed].ravel()).reshape(arrays[changed].shape)
    np.savez_compressed(path, **arrays)
    with pytest.raises(RunError, match="it does not hold what was written, its SHA-256 differs"):
        load(path)


def test_a_spectrum_that_is_not_finite_names_its_layer(tmp_path: Path):
    values = np.array([2.0, 1.0])
    save_spectra(tmp_path / "s.npz", [LayerSpectrum(MatrixShape("a.q", "q", 0, 2, 2), values, values * np.nan, values, values)])
    with pytest.raises(RunError, match=r"feature eigenvalues of a\.q hold NaN or Inf.*Delete the file and resume the run"):
        load_spectra(tmp_path / "s.npz")


def test_a_healing_does_not_go_on_from_a_checkpoint_with_other_bits(tmp_path: Path):
    values = {"a": torch.arange(2048.0)}
    state = Checkpoint("mine", 0.1, 4, 2, [], values, {"a": torch.ones(3)}, {}, {})
    save_checkpoint(tmp_path, state)
    result = load_checkpoint(tmp_path, "mine", torch.device("cpu"))
    assert result is not None
    assert torch.equal(result.values["a"], values["a"])
    path = tmp_path / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged .*SHA-256 differs.*Delete it to heal from the start"):
        load_checkpoint(tmp_path, "mine", torch.device("cpu"))


def test_archives_of_earlier_versions_are_still_read():
    recorded = bundled_path("assets", "recorded-run")
    with zipfile.ZipFile(recorded / "spectra.npz") as archive:
        assert "sha256.npy" not in archive.namelist()
    assert load_spectra(recorded / "spectra.npz")

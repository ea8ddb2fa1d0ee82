"""Spectra of weights alone: the same numbers as after a calibration, one matrix at a time, block by block, before it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import CalibrationConfig, ModelSource, RunConfig, TextConfig
from lowrank_core.errors import Cancelled, NumericalError
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.runs import create_run
from lowrank_core.spectra.spectrum import SPECTRA_FILE, WEIGHTS_FILE, LayerSpectrum, load_spectra, save_spectra
from lowrank_core.statistics import weight_spectra as module
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.statistics.spectra import spectra_of
from lowrank_core.statistics.weight_spectra import loaded_matrices, stored_matrices, weight_spectra
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.shared.stage_estimate import stage_estimate
from lowrank_core.text import WindowSet
from lowrank_core.worker.reporter import Reporter
from lowrank_core.worker.session import prepare

CALIBRATION = CalibrationConfig(group_size=4)


def _all(handle: ModelHandle) -> tuple[LayerSpectrum, ...]:
    return list(weight_spectra(loaded_matrices(handle), total=len(handle.layers)))[-1]


def _same(one: LayerSpectrum, other: LayerSpectrum) -> None:
    assert one.shape.name == other.shape.name
    np.testing.assert_array_equal(one.weight_singular_values, other.weight_singular_values)
    np.testing.assert_array_equal(one.shuffled_singular_values, other.shuffled_singular_values)


def test_they_are_those_of_a_calibration_block_by_block(llama: ModelHandle, windows: WindowSet):
    seen: list[tuple[int, int]] = []
    parts = list(weight_spectra(loaded_matrices(llama), total=len(llama.layers), progress=lambda *step: seen.append(step)))
    assert [len(part) for part in parts] == [7, 14]
    assert seen == [(done, 14) for done in range(1, 15)]
    assert not any(spectrum.calibrated for spectrum in parts[-1])
    statistics = collect_statistics(llama, windows, CALIBRATION)
    plain, reused = spectra_of(llama, statistics), spectra_of(llama, statistics, known=parts[-1])
    for weights, before, after in zip(parts[-1], plain, reused, strict=True):
        _same(weights, before)
        _same(weights, after)
        np.testing.assert_array_equal(before.feature_eigenvalues, after.feature_eigenvalues)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_what_a_loaded_model_gives(kind: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path):
    source = request.getfixturevalue(f"{kind}_checkpoint")
    AutoModelForCausalLM.from_pretrained(source).to(dtype).save_pretrained(tmp_path)
    for path in source.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    matrices = read_model(tmp_path).facts.matrices
    stored = stored_matrices(tmp_path, matrices)
    assert stored is not None
    whole = load_model(str(tmp_path), whole=[shape.name for shape in matrices])  # a file's fused projections are one matrix
    loaded = {spectrum.shape.name: spectrum for spectrum in _all(whole)}
    spectra = list(weight_spectra(stored, total=len(loaded)))[-1]
    assert len(spectra) == len(loaded)
    for spectrum in spectra:
        expected = loaded[spectrum.shape.name].weight_singular_values
        np.testing.assert_allclose(spectrum.weight_singular_values, expected, rtol=1e-10, atol=1e-12)


def test_one_matrix_is_read_at_a_time(llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    monkeypatch.setattr(module, "_read", lambda file, name: read.append(name) or torch.eye(2))
    shapes = read_model(llama_checkpoint).facts.matrices
    stored = stored_matrices(llama_checkpoint, shapes)
    assert stored is not None
    assert read == []
    for number, (shape, _) in enumerate(stored, start=1):
        assert read[-1] == f"{shape.name}.weight"
        assert len(read) == number


def test_matrices_that_are_no_tensors_of_their_own_are_left_to_a_loaded_model(llama_checkpoint: Path):
    shapes = read_model(llama_checkpoint).facts.matrices
    assert stored_matrices(llama_checkpoint, [*shapes, replace(shapes[0], name="model.layers.0.mlp.experts.3.up")]) is None


def test_what_is_known_is_not_computed_again(llama: ModelHandle, monkeypatch: pytest.MonkeyPatch):
    whole = _all(llama)
    known = whole[:7]
    (rest,) = weight_spectra(loaded_matrices(llama, without=[spectrum.shape.name for spectrum in known]), total=14, known=known)
    assert rest[:7] == known
    for one, other in zip(rest, whole, strict=True):
        _same(one, other)


def test_a_weight_that_is_not_finite_is_named(llama: ModelHandle):
    shape, weight = next(iter(loaded_matrices(llama)))
    damaged = weight.clone()
    damaged[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=shape.name):
        list(weight_spectra([(shape, damaged)], total=1))


def test_they_are_kept_and_read_again(llama: ModelHandle, tmp_path: Path):
    spectra = _all(llama)
    save_spectra(tmp_path / WEIGHTS_FILE, spectra)
    again = load_spectra(tmp_path / WEIGHTS_FILE)
    assert [spectrum.shape.name for spectrum in again] == [spectrum.shape.name for spectrum in spectra]
    assert not any(spectrum.calibrated for spectrum in again)
    np.testing.assert_allclose(again[0].weight_singular_values, spectra[0].weight_singular_values, rtol=1e-6)


def test_a_run_has_them_before_its_calibration_and_goes_on_from_them(
    llama_checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
):
    text = TextConfig(f"file:{text_file}", context=32, calibration_windows=12, validation_windows=4, test_windows=4)
    run = create_run(RunConfig(ModelSource(str(llama_checkpoint)), text, CALIBRATION))

    def stopped(*_: object, **__: object) -> None:
        raise Cancelled

    reporter = Reporter(run, verbose=False)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_core.compression.pipeline.cached_statistics", stopped)
        with pytest.raises(Cancelled):
            prepare(run, reporter)
    weights = load_spectra(run.path / WEIGHTS_FILE)
    assert len(weights) == 14
    save_spectra(run.path / WEIGHTS_FILE, weights[:7])  # killed between two blocks
    computed: list[str] = []
    real = module._spectrum
    monkeypatch.setattr(module, "_spectrum", lambda shape, weight: computed.append(shape.name) or real(shape, weight))
    prepare(run, reporter)
    reporter.close("finished")
    assert computed == [spectrum.shape.name for spectrum in weights[7:]]
    assert not (run.path / WEIGHTS_FILE).exists()
    spectra = load_spectra(run.path / SPECTRA_FILE)
    assert all(spectrum.calibrated for spectrum in spectra)
    for one, other in zip(spectra, weights, strict=True):
        _same(one, other)
    facts = read_model(llama_checkpoint).facts
    assert stage_estimate(run.config, facts).total is not None


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_the_command_needs_no_text(form: str, llama_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = llama_checkpoint if form == "folder" else write_gguf(llama_checkpoint, tmp_path / "a.gguf", quantization="F32")
    assert main(["analyze", "--model", str(place), "--weights-only", "--json"]) == 0
    output = capsys.readouterr()
    body = json.loads(output.out)
    assert body["read"] == ("file" if form == "folder" else "loaded")
    assert len(body["layers"]) == 14
    assert all(0 < row["weight_effective_rank"] <= min(row["d_out"], row["d_in"]) for row in body["layers"])
    assert [line for line in output.err.splitlines() if line.startswith("block ")][-1].endswith("14 of 14 matrices")

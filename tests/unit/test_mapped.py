"""Weights that are mapped from disk: the same model, the same numbers, and never more than is used in memory."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from exported import logits_of
from families import FAMILIES, built
from torch import nn

from lowrank_core.compression.pipeline import Pipeline
from lowrank_core.config import CalibrationConfig, ExportConfig, ModelSource, TextConfig
from lowrank_core.errors import ConfigError, ModelError
from lowrank_core.export import export, held_out
from lowrank_core.models import ModelHandle, load_model, mapped
from lowrank_core.models.mapped import MappedParameter, WeightMap, converted, release
from lowrank_core.runs import home

SMALL = "1KB"
"""Less than any process takes: all weights are mapped."""


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have no large weights; here all are."""
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 0)


def mapped_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if isinstance(parameter, MappedParameter)}


def pipeline(model: Path, text_file: Path, memory: str, preset: str = "studio") -> Pipeline:
    text = TextConfig(f"file:{text_file}", context=16, calibration_windows=12, test_windows=4)
    return Pipeline(ModelSource(str(model), memory=memory), text, calibration=CalibrationConfig(batch_size=4), compression=preset)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_mapped_model_is_the_model(name: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(f"{name}_checkpoint")
    whole, handle = load_model(ModelSource(str(place))), load_model(ModelSource(str(place), memory=SMALL))
    assert whole.weights is None
    assert not mapped_names(whole.module)
    assert mapped_names(handle.module) == {name for name, _ in handle.module.named_parameters()}
    assert handle.fingerprint == whole.fingerprint
    assert handle.layers == whole.layers
    assert handle.tied == whole.tied
    assert torch.equal(logits_of(handle.module), logits_of(whole.module))


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"rwkv"}))
def test_what_is_held_as_linear_layers_is_mapped_too(name: str, tmp_path: Path, sample_text: str) -> None:
    place = save_checkpoint(tmp_path / "model", built(name), sample_text)
    whole, handle = load_model(ModelSource(str(place))), load_model(ModelSource(str(place), memory=SMALL))
    assert {layer.name for layer in handle.layers} <= {name.rpartition(".")[0] for name in mapped_names(handle.module)}
    assert handle.fingerprint == whole.fingerprint
    assert torch.equal(logits_of(handle.module), logits_of(whole.module))


def test_a_model_that_writes_to_its_weights_is_refused(tmp_path: Path, sample_text: str) -> None:
    """RWKV's does before its first pass."""
    place = save_checkpoint(tmp_path / "model", built("rwkv"), sample_text)
    with pytest.raises(ModelError, match="changes its weights while it runs, so that they can't stay on disk"):
        load_model(ModelSource(str(place), memory=SMALL))


def test_that_weights_stay_on_disk_is_said(llama_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(ModelSource(str(llama_checkpoint), memory=SMALL))
    assert any("its weights stay on disk and are read block by block" in record.getMessage() for record in caplog.records)
    caplog.clear()
    load_model(ModelSource(str(llama_checkpoint)))
    assert not caplog.records


def test_nothing_is_left_on_disk(llama_checkpoint: Path) -> None:
    handle = load_model(ModelSource(str(llama_checkpoint), memory=SMALL))
    assert handle.weights is not None
    assert list(handle.weights.folder.iterdir()) == []


@pytest.mark.parametrize("preset", ["studio", "svd_llm"])
@pytest.mark.parametrize("form", ["compressed", "dense"])
def test_what_is_made_of_it_is_the_same(
    preset: str, form: str, llama_checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_core.compression.pipeline.check_memory", lambda *arguments: None)
    written = {}
    for memory in ("auto", SMALL):
        each = pipeline(llama_checkpoint, text_file, memory, preset)
        model = each.compress(0.3)
        folder = tmp_path / memory
        manifest = export(model, folder, config=ExportConfig(form=form, drop_biases=form == "dense"), test=held_out(each.handle, each.text))
        written[memory] = manifest.files, manifest.measured
        if memory == SMALL:
            assert mapped_names(model.handle.module) == {name for name, _ in model.handle.module.named_parameters()}
    assert written[SMALL] == written["auto"]


def test_a_copy_in_another_dtype_leaves_the_model_alone(llama_checkpoint: Path) -> None:
    handle = load_model(ModelSource(str(llama_checkpoint), memory=SMALL))
    before = logits_of(handle.module)
    copies = [converted(handle.module, torch.bfloat16, handle.weights), copy.deepcopy(handle.module).to(torch.float64)]
    assert [each.dtype for each in copies] == [torch.bfloat16, torch.float64]
    assert mapped_names(copies[0]) == mapped_names(handle.module)
    assert torch.equal(logits_of(copies[0]), logits_of(copy.deepcopy(load_model(str(llama_checkpoint)).module).to(torch.bfloat16)))
    assert torch.equal(logits_of(handle.module), before)


def test_copies_share_the_values(llama_checkpoint: Path) -> None:
    handle = load_model(ModelSource(str(llama_checkpoint), memory=SMALL))
    again = copy.deepcopy(handle.module)
    for one, other in zip(handle.module.parameters(), again.parameters(), strict=True):
        assert one is not other
        assert one.data_ptr() == other.data_ptr()


def test_what_is_mapped_is_not_trained(llama_checkpoint: Path) -> None:
    handle = load_model(ModelSource(str(llama_checkpoint), memory=SMALL))
    with pytest.raises(ModelError, match=r"can't be trained\. Use a machine with more memory"):
        handle.module.requires_grad_(True)


def test_memory_that_was_let_go_is_read_again(tmp_path: Path) -> None:
    values = torch.arange(1 << 16, dtype=torch.float32)
    parameter = WeightMap(tmp_path).held(values)
    parameter.release()
    assert torch.equal(parameter, values)


def test_only_what_is_in_a_file_is_let_go(tmp_path: Path) -> None:
    """Of a copy in another dtype, or of changed values, the file has nothing."""
    values = torch.arange(1 << 16, dtype=torch.float32)
    layer = nn.Module()
    layer.weight = WeightMap(tmp_path).held(values)
    cast = copy.deepcopy(layer).double()
    release(cast)
    assert torch.equal(cast.weight, values.double())
    with torch.no_grad():
        layer.weight.add_(1)
    release(layer)
    assert torch.equal(layer.weight, values + 1)


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(ModelError, match=r"weights need 4\.0 KiB in .*, and 10 bytes are free. Make room."):
        WeightMap(tmp_path).held(torch.zeros(1024))


@pytest.mark.parametrize(("size", "expected"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8)])
def test_a_size_of_memory_is_read(size: str, expected: int) -> None:
    assert ModelSource(memory=size).memory_bytes == expected


@pytest.mark.parametrize("size", ["", "4", "GB", "-1GB", "0GB", "4 bananas"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"is no size\. Give one such as 800MB or 4GB, or auto\."):
        ModelSource(memory=size)


def test_a_model_that_fits_stays_in_memory(llama: ModelHandle) -> None:
    assert llama.weights is None
    assert not (home() / "weights").exists()

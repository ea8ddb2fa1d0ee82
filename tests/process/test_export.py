"""Exports: what was measured is what is loaded, in any process; whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_cache_changes_nothing

from lowrank_core.compression.build import CompressedModel
from lowrank_core.compression.decomposed import decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource
from lowrank_core.errors import ModelError, RunError
from lowrank_core.evaluation import evaluate
from lowrank_core.export import check_free, export
from lowrank_core.models import LowRankLinear, ModelHandle, load_model
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet

ARCHITECTURES = ("llama", "gpt2", "qwen2")
IN_A_FRESH_PROCESS = """
import sys, numpy, torch
import lowrank_core.models  # the one line that plain transformers needs
from lowrank_core.config import ModelSource
from transformers import AutoModelForCausalLM
ids = torch.tensor([range(24)])
for folder in sys.argv[1:]:
    with torch.inference_mode():
        ours = lowrank_core.models.load_model(ModelSource(folder)).module(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    numpy.savez(folder + ".npz", ours=ours.numpy(), plain=plain.numpy())
"""


def _logits(handle: ModelHandle) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = handle.module(input_ids=torch.tensor([range(24)])).logits
    return logits


def _compressed(handle: ModelHandle, windows: WindowSet, ratio: float = 0.3) -> CompressedModel:
    statistics = collect_statistics(handle, windows, CalibrationConfig(group_size=8))
    decomposed = decompose(handle, statistics, CompressionConfig(value_dense=False))
    return decomposed.compress(decomposed.allocate("uniform", ratio), windows)


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, windows: WindowSet) -> dict[str, CompressedModel]:
    references = {name: str(request.getfixturevalue(f"{name}_checkpoint")) for name in ARCHITECTURES}
    return {name: _compressed(load_model(ModelSource(reference)), windows) for name, reference in references.items()}


@pytest.fixture(scope="module")
def exports(models: dict[str, CompressedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, model in models.items():
        export(model, root / name, provenance={"basis": "pooled_feature", "allocation": "uniform"})
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def fresh_logits(exports: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """What a process that knows nothing of this one computes from the folders."""
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *map(str, exports.values())], check=True, cwd=Path(__file__).parents[2])
    return {name: dict(np.load(f"{folder}.npz")) for name, folder in exports.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_process_computes_the_same_logits(
    name: str, models: dict[str, CompressedModel], fresh_logits: dict[str, dict[str, np.ndarray]]
):
    expected = _logits(models[name].handle).numpy()
    np.testing.assert_allclose(fresh_logits[name]["ours"], expected, atol=1e-5)
    np.testing.assert_allclose(fresh_logits[name]["plain"], expected, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_is_not_the_dense_model(name: str, models: dict[str, CompressedModel], request: pytest.FixtureRequest):
    dense = load_model(ModelSource(str(request.getfixturevalue(f"{name}_checkpoint"))))
    assert (_logits(models[name].handle) - _logits(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_manifest_and_the_loaded_model_have_the_counts_of_the_report(
    name: str, models: dict[str, CompressedModel], exports: dict[str, Path]
):
    report, loaded = models[name].report, load_model(ModelSource(str(exports[name])))
    manifest = json.loads((exports[name] / "lowrank.json").read_text())
    assert loaded.parameters == report.parameters_after == manifest["parameters_after"]
    assert loaded.linear_parameters == report.linear_parameters_after
    assert manifest["ranks"] == dict(report.ranks)
    assert manifest["basis"] == "pooled_feature"
    ranks = {name: layer.rank for name, layer in loaded.module.named_modules() if isinstance(layer, LowRankLinear)}
    assert ranks == {layer: rank for layer, rank in report.ranks.items() if rank is not None}
    stored = (exports[name] / "model.safetensors").stat().st_size
    assert report.bytes_after <= stored < report.bytes_after + 20_000  # the header


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_save_pretrained_of_a_loaded_export_round_trips(name: str, exports: dict[str, Path], tmp_path: Path):
    first = load_model(ModelSource(str(exports[name])))
    first.module.save_pretrained(tmp_path / "again")
    first.tokenizer.save_pretrained(tmp_path / "again")
    second = load_model(ModelSource(str(tmp_path / "again")))
    assert torch.equal(_logits(first), _logits(second))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_with_a_cache_equals_without(name: str, exports: dict[str, Path]):
    assert_cache_changes_nothing(load_model(ModelSource(str(exports[name]))).module)


def test_an_export_is_measured_beside_its_dense_model(exports: dict[str, Path], llama: ModelHandle, windows: WindowSet):
    report = evaluate(load_model(ModelSource(str(exports["llama"]))), windows, against=llama)
    assert report.compression_ratio == pytest.approx(0.3, abs=0.01)
    assert report.kl is not None
    assert report.kl > 0


def test_an_export_can_be_compressed_no_further_where_nothing_dense_is_left(exports: dict[str, Path], windows: WindowSet):
    with pytest.raises(ModelError, match="no dense linear layer left"):
        collect_statistics(load_model(ModelSource(str(exports["llama"]))), windows, CalibrationConfig())


def test_an_export_leaves_its_model_as_it_was(models: dict[str, CompressedModel], tmp_path: Path):
    before = models["llama"].handle.fingerprint
    export(models["llama"], tmp_path / "out", provenance={})
    assert models["llama"].handle.fingerprint == before


# --- whole, or not at all --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_behind(models: dict[str, CompressedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(models["llama"].handle.tokenizer), "save_pretrained", full)
    with pytest.raises(RunError, match="No space left on device"):
        export(models["llama"], tmp_path / "out", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing_behind(models: dict[str, CompressedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(models["llama"].handle.tokenizer), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(models["llama"], tmp_path / "out", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(models: dict[str, CompressedModel], tmp_path: Path):
    (tmp_path / "out").mkdir()
    export(models["llama"], tmp_path / "out", provenance={})
    assert (tmp_path / "out" / "lowrank.json").exists()


def test_places_that_are_taken_are_refused(models: dict[str, CompressedModel], tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        export(models["llama"], tmp_path, provenance={})
    with pytest.raises(RunError, match=r"note\.txt is a file"):
        check_free(tmp_path / "note.txt")
    with pytest.raises(RunError, match=r"note\.txt is no folder that you can write to"):
        check_free(tmp_path / "note.txt" / "deeper" / "out")
    check_free(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


# --- exports that were damaged ---------------------------------------------------------------------------------------


def _edit(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["layers"])
    path.write_text(json.dumps(config))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


QUERY = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (_cut, "model.safetensors is damaged or cut short"),
    "another rank": (lambda folder: _edit(folder, lambda layers: layers[QUERY].update(rank=3)), f"wrong shape .first: {QUERY}"),
    "no rank": (lambda folder: _edit(folder, lambda layers: layers[QUERY].pop("rank")), f"{QUERY}' no valid rank"),
    "an impossible rank": (lambda folder: _edit(folder, lambda layers: layers[QUERY].update(rank=33)), f"{QUERY}' no valid rank"),
    "a layer less": (lambda folder: _edit(folder, lambda layers: layers.pop(QUERY)), f"incomplete .*{QUERY}.weight"),
    "an unknown layer": (
        lambda folder: _edit(folder, lambda layers: layers.update({"model.brain": {"rank": 1, "bias": False}})),
        "'model.brain', which this architecture has not",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_exports_are_told(damage: str, exports: dict[str, Path], tmp_path: Path):
    spoil, message = DAMAGES[damage]
    folder = Path(shutil.copytree(exports["llama"], tmp_path / "broken"))
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_model(ModelSource(str(folder)))

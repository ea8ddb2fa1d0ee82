"""A folder is read as it was written, or not at all; and nothing in it is unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import all_forms, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.export import export
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.integrity import check_folder, sha256_of

LOADERS: dict[str, Callable[[Path], object]] = {
    "ours": lambda folder: load_model(ModelSource(str(folder))),
    "plain": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
}


@pytest.fixture(scope="module")
def model(llama: ModelHandle) -> CompressedModel:
    return all_forms(llama)


@pytest.fixture(scope="module")
def whole(model: CompressedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    export(model, root / "one", provenance={})
    export(model, root / "sharded", provenance={}, config=ExportConfig(max_shard_size="30KB"))
    return {"one": root / "one", "sharded": root / "sharded"}


@pytest.fixture
def broken(whole: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in whole.items()}


def _flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def _list(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "lowrank.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a byte is another": ("one", lambda f: _flip(f / "model.safetensors"), r"model\.safetensors is not what was exported, its sha256"),
    "cut short": ("one", lambda f: (f / "model.safetensors").write_bytes(b"x"), r"model\.safetensors is damaged or cut short: 1 bytes"),
    "a byte of a shard": ("sharded", lambda f: _flip(_shard(f)), r"model-00002-of-\d+\.safetensors is not what was exported"),
    "a shard is gone": ("sharded", lambda f: _shard(f).unlink(), r"model-00002-of-\d+\.safetensors"),
    "another index": ("sharded", lambda f: _flip(f / "model.safetensors.index.json", 30), r"(index\.json|safetensors)"),
    "a file put in front": (
        "sharded",
        lambda f: shutil.copyfile(_shard(f), f / "model.safetensors"),
        r"model\.safetensors is not among the files that lowrank\.json lists",
    ),
    "a manifest of text": ("one", lambda f: (f / "lowrank.json").write_text("hello"), r"lowrank\.json is damaged"),
    "files of a list": ("one", lambda f: _list(f, lambda body: body.update(files=[1])), r"lowrank\.json is damaged"),
    "a size of text": ("one", lambda f: _list(f, lambda b: b["files"]["model.safetensors"].update(bytes="1")), r"lowrank\.json is damaged"),
    "a file elsewhere": ("one", lambda f: _list(f, lambda b: b["files"].update({"../x": {}})), r"lowrank\.json is damaged"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_altered_is_refused_by_name(damage: str, loader: str, broken: dict[str, Path]):
    kind, spoil, message = DAMAGES[damage]
    spoil(broken[kind])
    with pytest.raises((ModelError, OSError) if damage == "a shard is gone" else ModelError, match=message) as caught:
        LOADERS[loader](broken[kind])
    if "index" not in damage and "gone" not in damage:
        assert "Copy or export the model again" in str(caught.value)


def test_the_whole_is_accepted(whole: dict[str, Path]):
    assert check_folder(whole["one"]) == 1
    assert check_folder(whole["sharded"]) == len(list(whole["sharded"].glob("model*")))


def test_hashes_are_those_of_the_files(whole: dict[str, Path]):
    import hashlib

    path = whole["one"] / "model.safetensors"
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    listed = json.loads((whole["one"] / "lowrank.json").read_text())["files"]
    assert listed == {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}}


def test_what_a_user_saves_elsewhere_is_read_without_a_manifest(whole: dict[str, Path], tmp_path: Path):
    first = AutoModelForCausalLM.from_pretrained(whole["one"])
    first.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own" / "lowrank.json").exists()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "own")), logits_of(first))


def test_what_a_user_saves_over_an_export_is_told_what_to_do(broken: dict[str, Path]):
    """The manifest is no longer that of the weights: an error says so, and how to go on."""
    folder = broken["one"]
    changed = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.get_submodule("model.norm").weight.mul_(2.0)
    changed.save_pretrained(folder)
    for load in LOADERS.values():
        with pytest.raises(ModelError, match=r"if you saved over it yourself, delete lowrank\.json"):
            load(folder)
    (folder / "lowrank.json").unlink()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(changed))


def test_an_export_of_the_first_versions_lists_no_files_and_loads(broken: dict[str, Path]):
    _list(broken["one"], lambda body: body.pop("files"))
    weights = load_file(broken["one"] / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, broken["one"] / "model.safetensors", {"format": "pt"})
    for load in LOADERS.values():
        load(broken["one"])


# --- nothing is unpickled --------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickle_beside_the_weights_is_not_read(loader: str, broken: dict[str, Path]):
    torch.save(_Bomb(), broken["one"] / "pytorch_model.bin")
    LOADERS[loader](broken["one"])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_of_pickles_alone_is_refused(loader: str, broken: dict[str, Path]):
    folder = broken["one"]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "lowrank.json").unlink()
    with pytest.raises(ModelError, match=r"safetensors"):
        LOADERS[loader](folder)


def test_weights_that_say_nothing_of_where_they_are_from_load(model: CompressedModel, broken: dict[str, Path]):
    """A file rewritten by another tool, with its manifest gone, is a checkpoint as any other."""
    folder = broken["one"]
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "lowrank.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(loaded), logits_of(model.handle.module), rtol=0, atol=1e-5)

"""The file that is read for headers, hashes and sizes is the file that transformers loads; a folder with several is reported.

Others than this environment's transformers: as in test_export_guard.py, by LOWRANK_TRANSFORMERS.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint, small_llama
from exported import all_forms
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.export import export
from lowrank_core.files.weights import weight_files
from lowrank_core.models import load_model, notes_of
from lowrank_core.studio.overview.checkpoint import read_model
from lowrank_core.studio.overview.headers import read_checkpoint

OTHERS = [folder for folder in os.environ.get("LOWRANK_TRANSFORMERS", "").split(os.pathsep) if folder]
INDEX = "model.safetensors.index.json"
LOADED = """
import json, sys, transformers
transformers.logging.set_verbosity_error()
found = {}
for folder in sys.argv[1:]:
    try:
        found[folder] = float(transformers.LlamaForCausalLM.from_pretrained(folder, use_safetensors=True).model.norm.weight[0])
    except Exception as error:
        found[folder] = None
print(json.dumps(found))
"""
"""The first number of the last norm says which of the sets was loaded: 1, 2 or 3; None where none is."""


def _keep(folder: Path, *names: str) -> None:
    for path in [*folder.glob("*.safetensors*"), *folder.glob("*.bin")]:
        if not any(path.match(name) for name in names):
            path.unlink()


def _config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _first(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


CASES: dict[str, tuple[Callable[[Path], object], float | None]] = {
    "one file and shards": (lambda f: _keep(f, "model*.safetensors", INDEX), 1),
    "one file alone": (lambda f: _keep(f, "model.safetensors"), 1),
    "shards alone": (lambda f: _keep(f, "model-*.safetensors", INDEX), 2),
    "everything": (lambda f: None, 1),
    "shards and another name": (lambda f: _keep(f, "model-*.safetensors", INDEX, "consolidated.safetensors"), 2),
    "another name": (lambda f: _keep(f, "consolidated.safetensors"), None),
    "shards without their index": (lambda f: _keep(f, "model-*.safetensors"), None),
    "a variant": (lambda f: (_keep(f, "model.safetensors"), (f / "model.safetensors").rename(f / "model.fp16.safetensors")), None),
    "pickles": (lambda f: _keep(f, "*.bin"), None),
    "an index that lists what is not there": (lambda f: (_keep(f, "model-*.safetensors", INDEX), _first(f).unlink()), None),
    "the same, with one file": (lambda f: (_keep(f, "model*.safetensors", INDEX), _first(f).unlink()), 1),
    "a name in config.json": (lambda f: _config(f, transformers_weights="consolidated.safetensors"), 3),
    "an index in config.json": (lambda f: _config(f, transformers_weights=INDEX), 2),
    "a name in config.json that is not there": (lambda f: _config(f, transformers_weights="none.safetensors"), None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """Three sets of weights in one folder, and pickles: 1 in one file, 2 in shards, 3 under another name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("several")
    for number, size in ((3, "1GB"), (2, "30KB"), (1, "1GB")):
        model = LlamaForCausalLM(small_llama(tie_word_embeddings=True, bos_token_id=0, eos_token_id=0))
        torch.nn.init.constant_(model.model.norm.weight, number)
        model.save_pretrained(root / str(number), max_shard_size=size)
    whole = save_checkpoint(root / "several", model, sample_text)
    for path in (root / "2").glob("model*"):
        shutil.copyfile(path, whole / path.name)
    shutil.copyfile(root / "3" / "model.safetensors", whole / "consolidated.safetensors")
    torch.save({}, whole / "pytorch_model.bin")
    return whole


@pytest.fixture
def several(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "several"))


def _norm(folder: Path, files: tuple[str, ...]) -> float:
    tensors = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    return float(tensors["model.norm.weight"][0])


@pytest.mark.process
@pytest.mark.parametrize("packages", ["", *OTHERS])
def test_what_we_read_is_what_transformers_loads(packages: str, folder: Path, tmp_path: Path):
    folders = {name: Path(shutil.copytree(folder, tmp_path / name.replace(" ", "-"))) for name in CASES}
    for name, (change, _) in CASES.items():
        change(folders[name])
    environment = {**os.environ, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADED, *map(str, folders.values())]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, (_, expected) in CASES.items():
        assert theirs[str(folders[name])] == expected, f"transformers itself: {name}"
        if expected is None:
            with pytest.raises(ModelError) as reported:
                weight_files(folders[name])
            assert "\n" not in str(reported.value)
            with pytest.raises(ModelError):
                load_model(ModelSource(str(folders[name])))
            continue
        assert _norm(folders[name], read_checkpoint(folders[name]).files) == expected, name
        assert float(load_model(ModelSource(str(folders[name]))).module.get_submodule("model.norm").weight[0]) == expected, name


def test_a_folder_with_several_sets_is_told_in_a_line(several: Path, caplog: pytest.LogCaptureFixture):
    (note,) = read_model(several).notes
    shards = len(list(several.glob("model-*.safetensors")))
    left = f"consolidated.safetensors, model-*-of-{shards:05}.safetensors, {INDEX}, pytorch_model.bin"
    assert note == f"The folder holds several sets of weights: transformers loads model.safetensors; not loaded: {left}."
    assert notes_of(str(several)) == (note,)
    with caplog.at_level(logging.WARNING):
        load_model(ModelSource(str(several)))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lowrank_core")] == [f"model: {note}"]
    _keep(several, "model-*.safetensors", INDEX, "*.bin")
    (note,) = read_model(several).notes
    assert f"transformers loads the {shards} shards of {INDEX}; not loaded: pytorch_model.bin." in note


def test_a_folder_with_one_set_is_told_nothing(several: Path):
    for keep in (("model.safetensors",), ("model-*.safetensors", INDEX)):
        copy = Path(shutil.copytree(several, several.with_name(keep[0][:6])))
        _keep(copy, *keep)
        assert read_model(copy).notes == notes_of(str(copy)) == ()


def test_analyze_compress_and_the_card_tell_of_it(several: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = ["--model", str(several), "--text", f"file:{text_file}", "--context", "32", "--windows", "40"]
    (note,) = notes_of(str(several))
    assert main(["analyze", *source, "--json"]) == 0
    assert note in json.loads(capsys.readouterr().out)["warnings"]
    options = ["--preset", "svd", "--compression-ratio", "0.3", "--out", str(tmp_path / "out")]
    assert main(["compress", *source, *options, "--json"]) == 0
    assert note in json.loads(capsys.readouterr().out)["warnings"]
    assert note in (tmp_path / "out" / "README.md").read_text()
    assert notes_of(str(tmp_path / "out")) == ()


def test_sizes_and_the_stored_dtype_are_those_of_what_is_loaded(several: Path):
    """The shards are in float32; the one file is cast to bfloat16, and config.json says nothing of it."""
    whole = several / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(whole).items()}, whole, {"format": "pt"})
    facts, handle = read_model(several).facts, load_model(ModelSource(str(several)))
    assert facts.dtype == "BF16"
    assert handle.stored_dtype == torch.bfloat16
    assert facts.bytes == handle.bytes == 2 * handle.parameters


def test_a_dense_export_with_a_file_put_in_front_is_refused(llama, several: Path, tmp_path: Path):
    out = tmp_path / "dense"
    export(all_forms(llama), out, provenance={}, config=ExportConfig(form="dense", max_shard_size="30KB"))
    load_model(ModelSource(str(out)))
    shutil.copyfile(several / "model.safetensors", out / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is not among the files that lowrank\.json lists"):
        load_model(ModelSource(str(out)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "holds a PEFT adapter"),
        ("shard-00000-model-00001-of-00002.safetensors", "holds a distributed checkpoint"),
    ],
)
def test_what_is_loaded_on_top_or_instead_is_refused(name: str, message: str, several: Path):
    (several / name).write_text('{"base_model_name_or_path": "x/y"}')
    for read in (read_model, lambda folder: load_model(ModelSource(str(folder)))):
        with pytest.raises(ModelError, match=message):
            read(several)

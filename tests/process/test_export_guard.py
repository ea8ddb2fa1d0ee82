"""Without our package, no way of transformers loads a folder of factors: it raises, instead of answering from random weights.

This environment's transformers is tried. For others, each installed into a folder of its own, give the folders::

    python -m pip install --target OLD transformers==5.10.1 openai fastapi pydantic uvicorn  # the last four for `transformers serve`
    LOWRANK_TRANSFORMERS=OLD:NEWER python -m pytest -n 0 tests/process/test_export_guard.py
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from exported import all_forms, logits_of
from families import built
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_core.cli import main
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.export import export, read_manifest
from lowrank_core.export.manifest import listed_files
from lowrank_core.models import load_model
from lowrank_core.models.guard import guard_name, unguarded
from lowrank_core.models.integrity import check_folder
from lowrank_core.studio.overview.checkpoint import read_model

SCRIPT = Path(__file__).parents[1] / "plain_transformers.py"
OTHERS = [folder for folder in os.environ.get("LOWRANK_TRANSFORMERS", "").split(os.pathsep) if folder]
FORMS = {
    "one file": ExportConfig(),
    "shards": ExportConfig(max_shard_size="30KB"),
    "with code": ExportConfig(with_code=True),
    "int8": ExportConfig(quantization="int8"),
    "half": ExportConfig(dtype="bfloat16"),
}
CASES = ("llama", "gpt2", "qwen2", "mixtral")
"""Tied, Conv1D, untied with biases; experts. Every form of factors is in each that has a place for it (``all_forms``)."""


@pytest.fixture(scope="module")
def mixtral_checkpoint(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("mixtral"), built("mixtral"), sample_text)


@pytest.fixture(scope="module")
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("guarded")
    for case in CASES:
        model = all_forms(load_model(ModelSource(str(request.getfixturevalue(f"{case}_checkpoint")))), centred=case == "gpt2")
        for name, config in FORMS.items():
            export(model, root / f"{case} {name}", provenance={}, config=config)
    return {path.name: path for path in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def one(exports: dict[str, Path]) -> Path:
    return exports["llama one file"]


def _layers(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]


def _guards(folder: Path) -> list[str]:
    return list(dict.fromkeys(guard_name(layer, entry) for layer, entry in _layers(folder).items()))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _without_guards(folder: Path, target: Path) -> Path:
    """Write ``folder`` as versions before the guard did: without it, and without our hashes."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "lowrank.json":
            (target / path.name).write_bytes(path.read_bytes())
    kept = {name: tensor for name, tensor in _tensors(folder).items() if tensor.numel()}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def _plainly(folders: Sequence[Path], home: Path, *, packages: str = "") -> list[dict[str, dict[str, str]]]:
    environment = {**os.environ, "PYTHONPATH": packages, "HF_MODULES_CACHE": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, folders)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=home)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert len(lines) == len(folders), done.stderr[-2000:]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("packages", ["", *OTHERS])
def test_without_our_package_no_way_loads_a_folder_of_factors(packages: str, exports: dict[str, Path], tmp_path: Path):
    for result in _plainly(list(exports.values()), tmp_path, packages=packages):
        assert "loaded" not in result["ways"].values(), result
        for way, reported in result["ways"].items():
            assert "mismatched" in reported or way == "pipeline", result


@pytest.mark.parametrize("packages", ["", *OTHERS])
def test_the_same_ways_load_a_dense_model_and_a_folder_without_guards(packages: str, llama_checkpoint: Path, one: Path, tmp_path: Path):
    """The test above has teeth: the fault is there without the guard."""
    for result in _plainly([llama_checkpoint, _without_guards(one, tmp_path / "old")], tmp_path, packages=packages):
        assert set(result["ways"].values()) == {"loaded"}, result


def test_what_a_user_saves_again_is_guarded_too(exports: dict[str, Path], tmp_path: Path):
    folders = []
    for case in CASES:
        AutoModelForCausalLM.from_pretrained(exports[f"{case} one file"]).save_pretrained(tmp_path / case)
        (tmp_path / case / "tokenizer.json").write_bytes((exports[f"{case} one file"] / "tokenizer.json").read_bytes())
        folders.append(tmp_path / case)
    for result in _plainly(folders, tmp_path):
        assert "loaded" not in result["ways"].values(), result


@pytest.mark.parametrize("name", [f"{case} {form}" for case in CASES for form in FORMS])
def test_every_compressed_layer_has_a_guard_that_holds_nothing(name: str, exports: dict[str, Path]):
    folder = exports[name]
    tensors, layers = _tensors(folder), _layers(folder)
    names = {guard_name(layer, entry) for layer, entry in layers.items()}
    assert {key for key, tensor in tensors.items() if not tensor.numel()} == names
    manifest = read_manifest(folder)
    assert manifest.written_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert manifest.guards == len(names)
    assert manifest.written_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
    assert load_model(ModelSource(str(folder))).parameters == manifest.written_parameters


def test_headers_count_a_guard_as_nothing_and_say_what_it_is(one: Path):
    parts = {part.name: part for part in read_model(one).parts}
    for layer, entry in _layers(one).items():
        part = parts[guard_name(layer, entry)]
        assert (part.parameters, part.compressible) == (0, False)
        assert part.why == "empty: makes transformers refuse the folder without our package"


def test_our_ways_pass_over_the_guards_without_a_word(one: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        module, reported = AutoModelForCausalLM.from_pretrained(one, output_loading_info=True)
    assert not reported["unexpected_keys"]
    assert not reported["mismatched_keys"]
    assert caplog.text == ""
    assert not any(name.endswith(tuple(_guards(one))) for name in module.state_dict())


def test_a_folder_of_an_earlier_version_loads_and_is_told_how_to_be_rewritten(one: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    old = _without_guards(one, tmp_path / "old")
    assert unguarded(_layers(old), [old / "model.safetensors"]) == _guards(old)
    with caplog.at_level(logging.WARNING):
        loaded = AutoModelForCausalLM.from_pretrained(old)
    assert torch.equal(logits_of(loaded), logits_of(AutoModelForCausalLM.from_pretrained(one)))
    reported = [record.getMessage() for record in caplog.records if record.name.startswith("lowrank_core")]
    assert len(reported) == 1
    assert "random weights, and no error" in reported[0]
    assert f"lowrank export --from {old} --out NEW" in reported[0]
    assert "\n" not in reported[0]


def test_names_are_left_to_transformers_whether_it_gives_the_model_or_not(one: Path):
    quantizer = AutoModelForCausalLM.from_pretrained(one).hf_quantizer
    assert quantizer.update_weight_conversions(["as they are"]) == ["as they are"]  # 5.19
    assert quantizer.update_weight_conversions(["as they are"], model=None) == ["as they are"]  # 5.24


# --- an older export is rewritten ------------------------------------------------------------------------------------


def _aged(folder: Path, target: Path, *, manifest: str = "whole") -> Path:
    """Write ``folder`` as an earlier version did: no guards, and a manifest that lists the files as they were."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for path in target.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(path).items() if tensor.numel()}, path, {"format": "pt"})
    for path in target.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        names = set(_guards(folder))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in names}
        path.write_text(json.dumps(index))
    body = json.loads((folder / "lowrank.json").read_text())
    del body["guards"]
    body["files"] = {name: asdict(file) for name, file in listed_files(target).items()}
    if manifest == "first versions":
        body = {name: body[name] for name in ("made_from", "ranks", "preset") if name in body}
    (target / "lowrank.json").write_text(json.dumps(body))
    (target / "README.md").write_text(
        "---\nlicense: mit\nbase_model: some/base\n---\n\n# Old\n\n## Loading\n\nOld words.\n\n## Licence\n\nMIT\n"
    )
    if manifest == "none":
        (target / "lowrank.json").unlink()
    return target


def _rewrite(old: Path, new: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["export", "--from", str(old), "--out", str(new), "--json"]) == 0, capsys.readouterr().err
    body: dict[str, object] = json.loads(capsys.readouterr().out)
    return body


@pytest.mark.parametrize("name", ["llama one file", "llama shards", "gpt2 with code", "qwen2 int8", "qwen2 half"])
def test_an_older_export_is_rewritten_bit_for_bit(name: str, exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old, new = _aged(exports[name], tmp_path / "old"), tmp_path / "new"
    assert _rewrite(old, new, capsys)["guards"] == len(_guards(old))
    before, after = _tensors(old), _tensors(new)
    assert set(after) - set(before) == set(_guards(old))
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    was, is_now = read_manifest(old), read_manifest(new)
    assert check_folder(new) == len(is_now.files)
    assert is_now.guards == len(_guards(old))
    assert {name: value for name, value in is_now.details.items() if name != "rewritten"} == was.details
    assert (is_now.written_parameters, is_now.measured, is_now.versions) == (was.written_parameters, was.measured, was.versions)
    card = (new / "README.md").read_text()
    assert "Old words" not in card
    assert "refuses the folder" in card
    assert "base_model: some/base" in card
    assert "license: mit" in card
    assert sorted(path.name for path in new.iterdir()) == sorted(path.name for path in exports[name].iterdir())
    if name == "llama shards":  # the others differ in nothing that it looks at
        assert "loaded" not in _plainly([new], tmp_path)[0]["ways"].values()
    assert torch.equal(logits_of(load_model(ModelSource(str(new))).module), logits_of(load_model(ModelSource(str(exports[name]))).module))


@pytest.mark.parametrize("manifest", ["none", "first versions"])
def test_an_older_export_that_says_little_is_rewritten_too(manifest: str, one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old, new = _aged(one, tmp_path / "old", manifest=manifest), tmp_path / "new"
    _rewrite(old, new, capsys)
    card = (new / "README.md").read_text()
    assert "Old words" not in card
    assert "refuses the folder" in card
    assert "## Licence\n\nMIT" in card
    assert (new / "lowrank.json").exists() is (manifest != "none")
    if manifest != "none":
        assert read_manifest(new).written_parameters == read_manifest(one).written_parameters
    assert not unguarded(_layers(new), [new / "model.safetensors"])
    load_model(ModelSource(str(new)))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, ["--from", "{today}"], "is in today's form already: nothing to rewrite"),
        (None, ["--from", "{dense}"], "holds no low-rank factors, so there is nothing to rewrite"),
        (None, ["--from", "{old}", "--dtype", "bfloat16"], "--from converts an export with unchanged weights; leave --trial"),
        (None, ["--from", "{old}", "--run", "x"], "not allowed with argument"),
        ("model.safetensors", ["--from", "{old}"], "is damaged or cut short"),
    ],
)
def test_what_can_not_be_rewritten_is_told_in_a_line(
    spoil: str | None, options: list[str], message: str, one: Path, llama_checkpoint: Path, tmp_path: Path, capsys
):
    old = _aged(one, tmp_path / "old")
    if spoil:
        (old / spoil).write_bytes(b"x")
    places = {"today": one, "dense": llama_checkpoint, "old": old}
    try:
        status = main(["export", *(option.format(**places) for option in options), "--out", str(tmp_path / "new")])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

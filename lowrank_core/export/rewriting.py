"""An export in another form; one of an earlier version in today's: the same numbers, with guards, today's hashes, code and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_core.compression.build import CompressedModel
from lowrank_core.config import ExportConfig, ModelSource
from lowrank_core.errors import ModelError
from lowrank_core.export.base_model import base_model_of
from lowrank_core.export.card import model_card, with_todays_loading
from lowrank_core.export.code import is_ours, write_code
from lowrank_core.export.folder import check_free, whole_folder
from lowrank_core.export.foreign import counted
from lowrank_core.export.manifest import ExportManifest, listed_files, read_manifest, report_of, versions
from lowrank_core.export.writing import export
from lowrank_core.files.weights import WeightFiles, read_object, weight_files
from lowrank_core.models import load_model
from lowrank_core.models.foreign import foreign_folder
from lowrank_core.models.guard import guard_name, guards, unguarded
from lowrank_core.models.hf import CODE, METHOD
from lowrank_core.models.integrity import MANIFEST, check_weights

__all__ = ["Rewritten", "convert", "rewrite"]


@dataclass(frozen=True)
class Rewritten:
    """Result of a conversion.

    Attributes:
        guards: how many empty tensors were added.
        manifest: of the new folder; None where the old one had none.
        left: names of weight files in the old folder that are not loaded, and were not copied.
    """

    guards: int
    manifest: ExportManifest | None
    left: tuple[str, ...]


def convert(folder: Path, target: Path, config: ExportConfig) -> ExportManifest:
    """Write the compressed model in ``folder``, ours or of another project's form, to ``target`` in the form of ``config``.

    Raises:
        ModelError: it holds no factors, is damaged, or has no place in that form.
        RunError: ``target`` is taken, or can't be written.
    """
    check_free(target)
    foreign = foreign_folder(str(folder))
    if foreign is not None:
        model = counted(load_model(ModelSource(str(folder))), foreign)
        return export(model, target, provenance={"imported_form": foreign.project}, config=config)
    manifest = read_manifest(folder)
    if manifest.form == "dense":
        raise ModelError(f"model: {folder} is a dense merge: no form with factors can be made of it. Export the trial again.")
    model = CompressedModel(load_model(ModelSource(str(folder))), report_of(manifest))
    return export(model, target, provenance=manifest.provenance, config=config, figures=manifest.figures)


def rewrite(folder: Path, target: Path) -> Rewritten:
    """Write the compressed model in ``folder`` to ``target``: every tensor bit for bit, with a guard for each compressed layer.

    Raises:
        ModelError: it holds no factors, is damaged, or is in today's form already.
        RunError: ``target`` is taken, or can't be written.
    """
    config = read_object(folder / "config.json")
    files, layers = weight_files(folder), _layers(config, folder)
    check_weights([folder / name for name in files.loaded])
    lacking = unguarded(layers, [folder / name for name in files.loaded])
    if not lacking:
        raise ModelError(f"model: {folder} is in today's form already: nothing to rewrite.")
    with whole_folder(target) as temporary:
        _copy_rest(folder, temporary, files)
        _write_weights(folder, temporary, files, lacking)
        if _with_code(config):
            write_code(_architecture(config, folder), temporary)
        manifest = _manifest(folder, temporary, len({guard_name(layer, entry) for layer, entry in layers.items()}), config)
        _write_card(folder, temporary, manifest)
    return Rewritten(len(lacking), manifest, files.ignored)


def _layers(config: Mapping[str, object], folder: Path) -> Mapping[str, Mapping[str, object]]:
    stated = config.get("quantization_config")
    layers = stated.get("layers") if isinstance(stated, dict) and stated.get("quant_method") == METHOD else None
    if not isinstance(layers, dict) or not layers:
        raise ModelError(f"model: {folder} holds no low-rank factors, so there is nothing to rewrite: transformers loads it as it is.")
    return layers


def _architecture(config: Mapping[str, object], folder: Path) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str) or not named[0].isidentifier():
        raise ModelError(f"model: config.json of {folder} names no architecture. Export the model again.")
    return named[0]


def _with_code(config: Mapping[str, object]) -> bool:
    named = config.get("auto_map")
    return isinstance(named, dict) and any(str(value).startswith(f"{CODE}.") for value in named.values())


def _copy_rest(folder: Path, target: Path, files: WeightFiles) -> None:
    """Copy everything but what is written again; weight files that nothing loads, and our own old code, stay behind."""
    left = {*files.loaded, files.index, *files.ignored, "README.md", MANIFEST}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in left and not is_ours(path):
            shutil.copyfile(path, target / path.name)


def _write_weights(folder: Path, target: Path, files: WeightFiles, lacking: list[str]) -> None:
    """Write the first file with the guards that are lacking, and copy the others."""
    first, *others = files.loaded
    for name in others:
        shutil.copyfile(folder / name, target / name)
    tensors = load_file(folder / first)
    with safe_open(folder / first, framework="pt") as archive:
        metadata = archive.metadata()
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    added = guards(lacking, dtype)
    save_file(tensors | added, target / first, metadata)
    _check_equal(tensors, load_file(target / first), first)
    if files.index:
        index = read_object(folder / files.index)
        listed = index["weight_map"]
        assert isinstance(listed, dict)
        index["weight_map"] = listed | dict.fromkeys(added, first)
        (target / files.index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_equal(before: Mapping[str, Tensor], after: Mapping[str, Tensor], file: str) -> None:
    for name, tensor in before.items():
        same = tensor.dtype == after[name].dtype and torch.equal(_bytes(tensor), _bytes(after[name]))
        if not same:
            raise ModelError(f"{name}: {file} was not written as it was read. Check the disk, and rewrite the folder again.")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _manifest(folder: Path, target: Path, guarded: int, config: Mapping[str, object]) -> ExportManifest | None:
    """Write ``lowrank.json`` of the new folder, and return it: provenance and measurements as they were."""
    if not (folder / MANIFEST).is_file():
        return None
    body = read_object(folder / MANIFEST)
    manifest = read_manifest(folder) if "files" in body else _of_the_first_versions(body, target, config)
    details = {**manifest.details, "rewritten": {"versions": versions()}}
    manifest = replace(manifest, files=listed_files(target), guards=guarded, details=details)
    manifest.write(target)
    return manifest


def _of_the_first_versions(body: Mapping[str, object], target: Path, config: Mapping[str, object]) -> ExportManifest:
    """Return a manifest that lacks what the first versions did not write, but for what the files themselves tell."""
    tensors = [tensor for name in weight_files(target).loaded for tensor in load_file(target / name).values()]
    floats = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point() and tensor.numel()})
    return ExportManifest(
        made_from=str(body.get("made_from", "a model that lowrank.json does not name")),
        form="compressed",
        stored_dtype=", ".join(floats),
        with_code=_with_code(config),
        files={},
        written_parameters=sum(tensor.numel() for tensor in tensors),
        details={name: value for name, value in body.items() if name not in ("made_from", "written_bytes", *_WRITTEN_ANEW)},
    )


_WRITTEN_ANEW = ("form", "stored_dtype", "with_code", "files", "written_parameters", "guards", "measured", "figures", "versions")


def _write_card(folder: Path, target: Path, manifest: ExportManifest | None) -> None:
    """Write the card again; where the counts for it are not there, the old one with today's words on loading."""
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    try:
        if manifest is None:
            raise ModelError("no counts")
        base = replace(base_model_of(str(folder)), reference=manifest.made_from, notes=())
        text = model_card(manifest, report_of(manifest), base)
    except ModelError:
        text = with_todays_loading(old, with_code=is_ours(target / f"{CODE}.py"))
    (target / "README.md").write_text(text, encoding="utf-8")

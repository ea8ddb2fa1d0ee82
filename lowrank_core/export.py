"""Writing the smaller model: a folder that ``from_pretrained`` and every command of ours read."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lowrank_core.compression import CompressedModel
from lowrank_core.errors import RunError
from lowrank_core.models.hf import mark_compressed

__all__ = ["check_free", "export"]


def check_free(folder: Path) -> None:
    """Raise unless ``folder`` can become an export.

    Raises:
        RunError: it holds something already, or its parent can't be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file. Give a new folder with --out.")
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty. Give a new folder with --out.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"can't write {folder}: {parent} is no folder that you can write to. Give another folder with --out.")


def export(model: CompressedModel, folder: Path, *, provenance: Mapping[str, object]) -> None:
    """Write model, tokenizer and ``lowrank.json`` (counts, ranks, how it was made): whole, or not at all.

    Weights are written in the dtype of the checkpoint that they came from, so that the folder is never larger than it was.

    Raises:
        RunError: the folder is taken, or the disk is full or read-only.
    """
    folder = folder.absolute()
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    report = asdict(model.report) | {
        "compression_ratio": model.report.compression_ratio,
        "model_compression_ratio": model.report.model_compression_ratio,
    }
    try:
        temporary.mkdir(parents=True)
        module = copy.deepcopy(model.handle.module).to(model.handle.stored_dtype)
        mark_compressed(module, provenance)
        module.save_pretrained(temporary)
        model.handle.tokenizer.save_pretrained(temporary)
        manifest = {"made_from": model.handle.reference, **provenance, **report}
        (temporary / "lowrank.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in filter(Path.is_file, temporary.rglob("*")):
            path.chmod(0o644)  # safetensors writes 0600, which hides a shared export from the rest of a team
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise RunError(f"can't write {folder}: {error.strerror or error}. Free some space, or give another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""A checkpoint's config and the headers of its safetensors files: every tensor by name, shape and dtype; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lowrank_core.errors import ModelError

__all__ = ["Checkpoint", "StoredTensor", "read_checkpoint", "weight_files"]

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of ``file`` describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, without its weights.

    Attributes:
        config: of config.json.
        tensors: of all files, in the order of the files.
        files: names of the weight files: one, or the shards that the index lists.
    """

    folder: Path
    config: Mapping[str, object]
    tensors: tuple[StoredTensor, ...]
    files: tuple[str, ...]

    def number(self, *names: str) -> int:
        """Return the first whole number that the config has under ``names``; 0 without one."""
        found = (self.config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return what the config and the headers in ``folder`` tell.

    Raises:
        ModelError: no config, no safetensors file, a shard that is missing, or a damaged file.
    """
    config, files = _object(folder / "config.json"), weight_files(folder)
    tensors = [tensor for file in files for tensor in _tensors(folder / file)]
    return Checkpoint(folder, config, tuple({tensor.name: tensor for tensor in tensors}.values()), files)


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the files that are loaded: the shards of the index, else model.safetensors, else every safetensors file.

    Raises:
        ModelError: there is none, or the index lists one that is missing.
    """
    if (folder / _INDEX).is_file():
        return _shards(folder)
    if (folder / _WHOLE).is_file():
        return (_WHOLE,)
    files = tuple(sorted(path.name for path in folder.glob("*.safetensors")))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file. Save the model again with safe_serialization=True.")
    return files


def _shards(folder: Path) -> tuple[str, ...]:
    listed = _object(folder / _INDEX).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / _INDEX} lists no weight files. Copy or download the model again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files (first: {missing[0]}). Copy or download the model again."
        )
    return tuple(names)


def _object(path: Path) -> dict[str, object]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} holds no {path.name}. Give the folder that save_pretrained wrote.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}.") from error
    if not isinstance(body, dict):
        raise ModelError(f"{path} holds no JSON object. Give the folder that save_pretrained wrote.")
    return body


def _tensors(file: Path) -> Sequence[StoredTensor]:
    try:
        with safe_open(file, framework="numpy") as archive:
            slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118  (the archive is no mapping)
            return [StoredTensor(name, tuple(view.get_shape()), str(view.get_dtype()), file.name) for name, view in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {error}. Copy or download the model again.") from error

"""Config and safetensors headers of a checkpoint: names, shapes and dtypes, without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lowrank_core.errors import ModelError
from lowrank_core.files.weights import read_object, weight_files

__all__ = ["Checkpoint", "StoredTensor", "read_checkpoint", "same_values"]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


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


def same_values(folder: Path, first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors hold the same bytes, as far as samples spread over them tell: two that were trained apart differ in all.

    Raises:
        ModelError: a file is damaged.
    """
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    places = range(0, first.bytes, max(_SAMPLE_BYTES, first.bytes // _SAMPLES))
    return all(_sample(folder, first, place) == _sample(folder, second, place) for place in places)


def _sample(folder: Path, tensor: StoredTensor, place: int) -> bytes:
    """Return some bytes of a tensor from ``place`` on; a file is an 8-byte length, a header in JSON, and the data."""
    try:
        with (folder / tensor.file).open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            begin, end = json.loads(stream.read(length))[tensor.name]["data_offsets"]
            stream.seek(8 + length + begin + place)
            return stream.read(min(_SAMPLE_BYTES, end - begin - place))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / tensor.file} is damaged: {error}. Copy or download the model again.") from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights.

    Attributes:
        config: of config.json.
        tensors: of all files, in the order of the files.
        files: names of the weight files that are loaded: one, or the shards that the index lists.
        note: what else is there and is not loaded, in a line; empty where there is nothing.
    """

    folder: Path
    config: Mapping[str, object]
    tensors: tuple[StoredTensor, ...]
    files: tuple[str, ...]
    note: str = ""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

    def number(self, *names: str) -> int:
        """Return the first whole number that the config, or its part on text, has under ``names``; 0 without one."""
        text = self.config.get("text_config")
        config = {**self.config, **text} if isinstance(text, dict) else self.config
        result = (config.get(name) for name in names)
        return next((value for value in result if isinstance(value, int) and not isinstance(value, bool)), 0)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the config and tensor headers of ``folder``.

    Raises:
        ModelError: no config, no safetensors file, a shard that is missing, or a damaged file.
    """
    config, files = read_object(folder / "config.json"), weight_files(folder)
    tensors = [tensor for file in files.loaded for tensor in _tensors(folder / file)]
    return Checkpoint(folder, config, tuple({tensor.name: tensor for tensor in tensors}.values()), files.loaded, files.note)


def _tensors(file: Path) -> Sequence[StoredTensor]:
    try:
        with safe_open(file, framework="numpy") as archive:
            slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118  (the archive is no mapping)
            return [StoredTensor(name, tuple(view.get_shape()), str(view.get_dtype()), file.name) for name, view in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {error}. Copy or download the model again.") from error

"""Config and tensor headers of a checkpoint, in safetensors or GGUF: names, shapes and dtypes, without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lowrank_core.errors import ModelError
from lowrank_core.files.checkpoints import check_folder_kind, dequantized_method, dequantized_note
from lowrank_core.files.foreign import read_foreign
from lowrank_core.files.gguf import GgufFile, is_gguf, read_gguf
from lowrank_core.files.weights import read_object, weight_files

__all__ = ["Checkpoint", "StoredTensor", "read_checkpoint", "same_values"]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_SAMPLES, _SAMPLE_BYTES = 16, 2**16

_GGUF_BLOCK = re.compile(r"blk\.(?P<depth>\d+)\.(?P<module>[^.]+)(?P<rest>\..*)?")
_GGUF_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_GGUF_INSIDE = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")},
    **{f"attn_{name}_norm": f"self_attn.{name}_norm" for name in ("q", "k")},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    **{f"ffn_{name}_exps": f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")},
    **{f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
    "attn_output": "self_attn.o_proj",
    "ffn_gate_inp": "mlp.gate",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Name in a GGUF file -> name in most decoders of transformers, outside and inside the blocks."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of ``file`` describes it; ``packed_bytes`` of one in quantised blocks, ``stored_as`` of a renamed one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    packed_bytes: int | None = None
    stored_as: str = ""

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * _BYTES.get(self.dtype, 1) if self.packed_bytes is None else self.packed_bytes


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
            begin, end = json.loads(stream.read(length))[tensor.stored_as or tensor.name]["data_offsets"]
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
        notes: what a user should know of them, a line each, such as what else is there and is not loaded.
        stored_dtype: in which what is made of it is written, where that is no dtype of its tensors.
    """

    folder: Path
    config: Mapping[str, object]
    tensors: tuple[StoredTensor, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    stored_dtype: str = ""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

    def number(self, *names: str) -> int:
        """Return the first whole number that the config, or its part on text, has under ``names``; 0 without one."""
        text = self.config.get("text_config")
        config = {**self.config, **text} if isinstance(text, dict) else self.config
        result = (config.get(name) for name in names)
        return next((value for value in result if isinstance(value, int) and not isinstance(value, bool)), 0)


def read_checkpoint(place: Path) -> Checkpoint:
    """Return the config and tensor headers of a folder, or of a GGUF file.

    Raises:
        ModelError: no config, no safetensors file, a shard that is missing, a damaged file, or a folder of another kind.
    """
    if place.is_file() and is_gguf(place):
        return _of_gguf(read_gguf(place))
    check_folder_kind(place)
    config, files, foreign = read_object(place / "config.json"), weight_files(place), read_foreign(place)
    tensors = [tensor for file in files.loaded for tensor in _tensors(place / file)]
    if foreign is not None:
        config = dict(foreign.config)
        tensors = [replace(tensor, name=foreign.names.get(tensor.name, tensor.name), stored_as=tensor.name) for tensor in tensors]
    method = dequantized_method(config)
    if method:
        tensors = [plain for tensor in tensors if (plain := _dequantized(tensor)) is not None]
    tensors = [_unpacked(tensor, config) for tensor in tensors]
    notes = tuple(filter(None, (files.note, dequantized_note(config, str(place)))))
    dtype = "bfloat16" if method else ""
    return Checkpoint(place, config, tuple({tensor.name: tensor for tensor in tensors}.values()), files.loaded, notes, dtype)


def _dequantized(tensor: StoredTensor) -> StoredTensor | None:
    """Return a tensor of a checkpoint in fp8 or mxfp4 as the model has it; None for the scales of another."""
    if tensor.name.endswith(("_scale_inv", "_scales")):
        return None
    if not tensor.name.endswith("_blocks"):
        return tensor
    experts, rows, groups, half = tensor.shape  # two numbers in a byte
    return replace(tensor, name=tensor.name.removesuffix("_blocks"), shape=(experts, groups * half * 2, rows), packed_bytes=tensor.bytes)


def _unpacked(tensor: StoredTensor, config: Mapping[str, object]) -> StoredTensor:
    """Return a matrix that an export of ours has in int4, two numbers in a byte, in its own shape."""
    layer, _, matrix = tensor.name.removesuffix(".values").rpartition(".")
    stated = config.get("quantization_config")
    layers = stated.get("layers") if isinstance(stated, dict) else None
    entry = layers.get(layer) if isinstance(layers, dict) else None
    if tensor.dtype != "U8" or not tensor.name.endswith(".values") or not isinstance(entry, dict):
        return tensor
    padded, rank, hidden = 2 * tensor.shape[-1], entry.get("rank", 0), config.get("hidden_size")
    known = {
        "up": rank,
        "coefficients": rank,
        "outputs": rank * entry.get("heads", 1),
        "rest": hidden - rank if isinstance(hidden, int) else 0,
    }
    columns = padded - 1 if known.get(matrix) == padded - 1 else padded
    return replace(tensor, shape=(*tensor.shape[:-1], columns), packed_bytes=tensor.bytes)


def _of_gguf(file: GgufFile) -> Checkpoint:
    """Return a GGUF file under the names that most decoders of transformers have; names that are not known stay as they are."""
    tensors = tuple(StoredTensor(_plain_name(t.name), t.shape, t.type, file.path.name, t.bytes) for t in file.weights)
    config: dict[str, object] = {
        "architectures": [f"{file.architecture} (GGUF)"],
        "vocab_size": file.vocabulary,
        "hidden_size": file.number("embedding_length"),
        "max_position_embeddings": file.number("context_length"),
    }
    return Checkpoint(file.path, config, tensors, (file.path.name,), file.notes, file.stored_dtype)


def _plain_name(name: str) -> str:
    """Return the name that a tensor of llama.cpp has in most decoders: ``blk.0.attn_q`` is ``model.layers.0.self_attn.q_proj``."""
    match = _GGUF_BLOCK.fullmatch(name)
    if match is None:
        stem, dot, leaf = name.partition(".")
        return f"{_GGUF_OUTSIDE.get(stem, stem)}{dot}{leaf}"
    return f"model.layers.{match['depth']}.{_GGUF_INSIDE.get(match['module'], match['module'])}{match['rest']}"


def _tensors(file: Path) -> Sequence[StoredTensor]:
    try:
        with safe_open(file, framework="numpy") as archive:
            slices = {name: archive.get_slice(name) for name in archive.keys()}  # noqa: SIM118  (the archive is no mapping)
            return [StoredTensor(name, tuple(view.get_shape()), str(view.get_dtype()), file.name) for name, view in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged: {error}. Copy or download the model again.") from error

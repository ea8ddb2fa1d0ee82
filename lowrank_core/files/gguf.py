"""Header of a GGUF file: metadata, names, shapes and types of its tensors, without weights. Torch-free, and without the ``gguf`` package.

A file is ``GGUF``, a version, the numbers of tensors and of metadata entries, the entries (key, type, value), and for each tensor its name,
sizes (the fastest axis first), type and place. Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lowrank_core.errors import ModelError

__all__ = ["GgufFile", "GgufTensor", "is_gguf", "read_gguf"]

_SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
}
"""Number of a type -> name, elements of a block, bytes of a block."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_NO_MODELS = {
    "adapter": "a LoRA adapter",
    "mmproj": "a vision encoder (mmproj)",
    "imatrix": "an importance matrix",
    "vocab": "a vocabulary",
}
_NAMED_SHARE = 0.5  # percent: the vectors of the norms are nearly always float32
_ROPE_TABLE = "rope_freqs"
_READ_SCALING = ("gpt-oss",)
"""Architectures whose scaling of rotary positions transformers takes from the file (5.24)."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it; ``shape`` is in the order of torch, so (d_out, d_in) for a matrix."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file without its weights.

    Attributes:
        metadata: single values by key. lengths: of arrays, by key.
        tensors: in the order of the file.
    """

    path: Path
    metadata: Mapping[str, object]
    lengths: Mapping[str, int]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """Architecture in the words of llama.cpp, such as ``llama`` or ``qwen2``."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def weights(self) -> tuple[GgufTensor, ...]:
        """The tensors of the model: no table of rotary frequencies, no blocks that only predict tokens further ahead."""
        extra = range(self.number("block_count") - self.number("nextn_predict_layers"), self.number("block_count"))
        ahead = tuple(f"blk.{depth}." for depth in extra)
        return tuple(tensor for tensor in self.tensors if _ROPE_TABLE not in tensor.name and not tensor.name.startswith(ahead))

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.weights)

    @property
    def bits(self) -> float:
        """Bits of a parameter, on average."""
        return 8 * sum(tensor.bytes for tensor in self.weights) / max(1, self.parameters)

    @property
    def types(self) -> dict[str, int]:
        """Type -> parameters held in it, the most frequent first."""
        sums: dict[str, int] = {}
        for tensor in self.weights:
            sums[tensor.type] = sums.get(tensor.type, 0) + tensor.elements
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def stored_dtype(self) -> str:
        """Float dtype to write what was made of it in: that of most weights, and bfloat16 for quantised ones."""
        names = {"F64": "float64", "F32": "float32", "F16": "float16"}
        return names.get(next(iter(self.types), ""), "bfloat16")

    @property
    def vocabulary(self) -> int:
        return self.number("vocab_size") or self.lengths.get("tokenizer.ggml.tokens", 0)

    def number(self, key: str) -> int:
        """Return a whole number of the architecture's own metadata; 0 without it."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    @property
    def quantization(self) -> str:
        """Types and their shares, such as ``Q4_1 79 %, Q8_0 21 %``, and bits per parameter."""
        shares = {name: 100 * count / max(1, self.parameters) for name, count in self.types.items()}
        words = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items() if share >= _NAMED_SHARE)
        return f"{words}; {self.bits:.2f} bits per parameter"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for a user, a line each: how it is quantised, and what is lost."""
        dequantised = "dequantised when it is read; what is counted and written is the dequantised model, larger than this file"
        words = dequantised if any(name not in _FLOATS for name in self.types) else "its weights are floats, read as they are"
        return (f"{self.path.name} is a GGUF file ({self.quantization}): {words}.", *self._lost_positions)

    @property
    def _lost_positions(self) -> tuple[str, ...]:
        if self.architecture in _READ_SCALING:
            return ()
        key = f"{self.architecture}.rope.scaling.type"
        scaled = self.metadata.get(key) not in (None, "none") or any(_ROPE_TABLE in tensor.name for tensor in self.tensors)
        if not scaled:
            return ()
        return (
            f"{self.path.name} scales its rotary positions, and transformers does not read that from a GGUF file: "
            "its perplexity differs from that of the original model, which is the better one to start from.",
        )


def is_gguf(reference: str | Path) -> bool:
    """Return whether ``reference`` names a GGUF file, there or not."""
    return str(reference).lower().endswith(_SUFFIX)


def read_gguf(path: Path) -> GgufFile:
    """Return the header of a GGUF file that holds a whole model.

    Raises:
        ModelError: it can't be read, is cut short, is one of several parts, or holds something else than a model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            result, begin = _header(path, _Reader(data))
            size = len(data)
    except (OSError, struct.error, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path} is no GGUF file, or it is cut short ({error}). Copy or download it again.") from error
    _check_model(result)
    if begin + sum(tensor.bytes for tensor in result.tensors) > size:
        raise ModelError(f"{path} is cut short: its header lists more tensors than its {size:,} bytes hold. Copy or download it again.")
    return result


def _check_model(file: GgufFile) -> None:
    name, parts = file.path.name, file.metadata.get("split.count")
    kind = _NO_MODELS.get(str(file.metadata.get("general.type", ""))) or (
        "a vision encoder (mmproj)" if file.architecture == "clip" else ""
    )
    if kind:
        raise ModelError(f"{name} holds {kind}, no language model. Give the GGUF file of the model.")
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{name} is one of {parts} parts. Join them (`llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf`), and give that file."
        )
    if not file.tensors:
        raise ModelError(f"{name} holds no weights. Give the GGUF file of the model.")


class _Reader:
    """Little-endian values from a position on; reading past the end raises ``struct.error``."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return value  # type: ignore[no-any-return]

    def skip(self, length: int) -> int:
        """Pass ``length`` bytes, and return where they begin."""
        begin = self.place
        if length < 0 or begin + length > len(self.data):
            raise ValueError(f"a value at byte {begin:,} ends after the file")
        self.place += length
        return begin

    def string(self) -> str:
        length = self.number("Q")
        begin = self.skip(length)
        return self.data[begin : begin + length].decode("utf-8")

    def array(self) -> int:
        """Pass an array, and return its length."""
        kind, length = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(length):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of the unknown type {kind}")
        return length


def _header(path: Path, reader: _Reader) -> tuple[GgufFile, int]:
    """Return the header, and where it ends."""
    if reader.data[:4] != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    reader.skip(4)
    version = reader.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; {' and '.join(map(str, _VERSIONS))} are known, little-endian")
    tensors, entries = reader.number("Q"), reader.number("Q")
    metadata: dict[str, object] = {}
    lengths: dict[str, int] = {}
    for _ in range(entries):
        key, kind = reader.string(), reader.number("I")
        if kind == _ARRAY:
            lengths[key] = reader.array()
        elif kind == _STRING:
            metadata[key] = reader.string()
        elif kind in _SCALARS:
            metadata[key] = reader.number(_SCALARS[kind])
        else:
            raise ValueError(f"{key} is of the unknown type {kind}")
    result = tuple(_tensor(reader) for _ in range(tensors))
    return GgufFile(path, metadata, lengths, result), reader.place


def _tensor(reader: _Reader) -> GgufTensor:
    name, axes = reader.string(), reader.number("I")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    kind = reader.number("I")
    reader.skip(8)  # where its data begins
    label, elements, size = _TYPES.get(kind, (f"type {kind}", 1, 1))
    return GgufTensor(name, shape, label, prod(shape) // elements * size)

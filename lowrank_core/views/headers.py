"""Facts of a checkpoint from its config and the headers of its safetensors files; no weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lowrank_core.accounting import MatrixShape
from lowrank_core.errors import ModelError
from lowrank_core.views.model import ModelFacts

__all__ = ["header_facts"]

_BLOCK = re.compile(r"^(?P<stem>.*?\.)(?P<depth>\d+)\.(?P<path>.+)\.weight$")
_SHARED_INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return prod(self.shape)


def header_facts(folder: Path) -> ModelFacts:
    """Return what the headers in ``folder`` tell. Module types and shared inputs are told by their names.

    Raises:
        ModelError: no config, no safetensors file, or a damaged one.
    """
    config = _config(folder)
    tensors = _tensors(folder)
    matrices = tuple(_matrices(tensors))
    return ModelFacts(
        reference=str(folder),
        architecture=_architecture(config),
        dtype=", ".join(sorted({tensor.dtype for tensor in tensors.values()})),
        parameters=sum(tensor.elements for tensor in tensors.values()),
        compressible_parameters=sum(matrix.dense_parameters for matrix in matrices),
        bytes=sum(tensor.elements * _BYTES.get(tensor.dtype, 1) for tensor in tensors.values()),
        vocabulary=_whole(config, "vocab_size"),
        max_context=_whole(config, "max_position_embeddings") or None,
        blocks=len({matrix.depth for matrix in matrices}),
        hidden=_whole(config, "hidden_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        matrices=matrices,
        input_widths={f"{m.depth}.{_SHARED_INPUTS.get(m.kind, m.kind)}": m.d_in for m in matrices},
    )


def _architecture(config: Mapping[str, object]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(config.get("model_type", ""))


def _whole(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def _config(folder: Path) -> dict[str, object]:
    try:
        body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no config.json. Give the folder that save_pretrained wrote.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json can't be read: {error}.") from error
    if not isinstance(body, dict):
        raise ModelError(f"{folder}/config.json holds no JSON object. Give the folder that save_pretrained wrote.")
    return body


def _tensors(folder: Path) -> dict[str, _Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file. Save the model again with safe_serialization=True.")
    found: dict[str, _Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as archive:
                for name in archive.keys():  # noqa: SIM118  (the archive is no mapping)
                    view = archive.get_slice(name)
                    found[name] = _Tensor(tuple(view.get_shape()), str(view.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged: {error}. Copy or download the model again.") from error
    return found


def _matrices(tensors: Mapping[str, _Tensor]) -> list[MatrixShape]:
    found = []
    for name, tensor in tensors.items():
        match = _BLOCK.match(name)
        if match is None or len(tensor.shape) != 2 or min(tensor.shape) < 2:
            continue
        d_out, d_in = tensor.shape
        kind = match["path"].rsplit(".", 1)[-1]
        bias = name.removesuffix("weight") + "bias" in tensors
        found.append(MatrixShape(name.removesuffix(".weight"), kind, int(match["depth"]), d_out, d_in, bias))
    return sorted(found, key=lambda matrix: matrix.depth)

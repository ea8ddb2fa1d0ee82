"""Contents of a checkpoint by names and shapes: what is compressible, and why the rest is not.

The worker sees more than headers do (what layers share, what a pass reaches): once it is there, model.json comes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import pandas as pd

from lowrank_core.coverage import KINDS, Coverage, has_experts, kind_by_name
from lowrank_core.files.weights import unguarded_note, without_guard
from lowrank_core.parameters import MatrixShape, module_type
from lowrank_core.studio.overview.headers import Checkpoint, StoredTensor, read_checkpoint, same_values
from lowrank_core.studio.overview.stored_experts import expert_matrices
from lowrank_core.studio.shared.model_facts import ModelFacts
from lowrank_core.studio.shared.table import frame_of

__all__ = ["ModelOnDisk", "Part", "checkpoint_facts", "parts_of", "read_model", "tensor_table"]

_NUMBERED = re.compile(r"^(?P<stem>.+?)\.(?P<depth>\d+)\.(?P<path>.+)$")
_SENSES = re.compile(r"vision|visual|image|audio|speech")
_POSITIONS = re.compile(r"position|wpe|per_layer")  # tables that are never the head
_WHY = {"router": "router of the experts"}
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_HEAD_FACTORS = tuple(name.replace("weight", f"{half}.weight") for name in _HEADS for half in ("up", "down"))
_HEAD_BIASES = tuple(name.replace(".weight", ".bias") for name in _HEADS)
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_TRANSPOSED = ("gpt2", "openai-gpt")  # their Conv1D stores W transposed
_SHARED_INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_ORDER = (
    *("norm", "ln_1", "q_", "query", "k_", "v_", "c_attn", "o_", "out_proj", "dense_h_to_4h", "dense_4h_to_h", "dense"),
    *("gate", "up_", "c_fc", "fc1", "down", "c_proj", "fc2"),
)
"""Beginnings or parts of a module's name, in the order in which a block uses them."""


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint, and its treatment.

    Attributes:
        shape: as stored.
        parameters: that it adds to the model; 0 for a second copy, or a table that is no parameter.
        block: number of its decoder block; None outside.
        path: name within the block, or the whole name.
        compressible: whether it is the matrix of a linear layer in a block.
        why: in words, why it is left alone; empty where it is not.
        kind: name in ``coverage.KINDS``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    parameters: int
    block: int | None
    path: str
    compressible: bool
    why: str
    kind: str = "other"

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def type(self) -> str:
        """Path of its module within the block, which blocks share."""
        return self.path.rpartition(".")[0] or self.path


@dataclass(frozen=True)
class ModelOnDisk:
    """A checkpoint, from its headers.

    Attributes:
        files: the weight files that are loaded.
        notes: what a user should know of the folder, a line each.
    """

    parts: tuple[Part, ...]
    facts: ModelFacts
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_model(place: Path) -> ModelOnDisk:
    """Return the contents of the model in a folder, or in a GGUF file.

    Raises:
        ModelError: as ``read_checkpoint``.
    """
    checkpoint = read_checkpoint(place)
    parts = parts_of(checkpoint)
    notes = (*checkpoint.notes, *filter(None, [_note_of_missing_guards(checkpoint)]))
    return ModelOnDisk(parts, checkpoint_facts(checkpoint, parts), checkpoint.files, notes)


def _note_of_missing_guards(checkpoint: Checkpoint) -> str:
    empty = [tensor.name for tensor in checkpoint.tensors if not tensor.elements]
    return unguarded_note(checkpoint.folder) if without_guard(_guarded_layers(checkpoint), empty) else ""


def parts_of(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Return every tensor in model order."""
    stem = _stem(checkpoint.tensors)
    tied = _tied(checkpoint)
    experts = _blocks_with_experts(checkpoint.tensors, stem)
    parts = [_part(tensor, stem, checkpoint, tied, experts) for tensor in checkpoint.tensors]
    matrices = {part.module: part.kind for part in parts if part.kind in ("linear", "expert", "narrow")}
    parts = [_with_bias(part, matrices) for part in parts]
    assert len(parts) == len(checkpoint.names)
    return tuple(sorted(parts, key=_place))


def _stem(tensors: Sequence[StoredTensor]) -> str:
    """Return the name of the largest list of blocks that is not in a part of the model that sees or hears."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if match := _NUMBERED.match(tensor.name):
            sizes[match["stem"]] = sizes.get(match["stem"], 0) + tensor.elements
    return max(sizes, key=lambda stem: (not _SENSES.search(stem), sizes[stem]), default="")


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether embedding and head are one matrix, as transformers decides it.

    Where the config does not say, a checkpoint without a head ties it; where it says so and both are there, they are if they are equal.
    """
    stated = checkpoint.config.get("tie_word_embeddings")
    head = next((tensor for tensor in checkpoint.tensors if tensor.name.endswith(_HEADS)), None)
    if stated is not True or head is None:
        return stated if isinstance(stated, bool) else head is None
    alike = [tensor for tensor in checkpoint.tensors if tensor.shape == head.shape and _is_table(tensor.name)]
    return not alike or any(same_values(checkpoint.folder, tensor, head) for tensor in alike)


def _part(tensor: StoredTensor, stem: str, checkpoint: Checkpoint, tied: bool, experts: set[int]) -> Part:
    match = _NUMBERED.match(tensor.name)
    inside = match is not None and match["stem"] == stem
    block, path = (int(match["depth"]), match["path"]) if match is not None and inside else (None, tensor.name)
    part = Part(tensor.name, tensor.shape, tensor.dtype, tensor.file, tensor.elements, block, path, False, "")
    if block is None:
        kind, why = _outside(part, tied)
    else:
        kind, why = _inside(part, checkpoint, experts=block in experts)
    counted = 0 if why.startswith(("second copy", "table")) else part.parameters
    return replace(part, parameters=counted, compressible=kind in ("linear", "expert"), why=why, kind=kind)


def _outside(part: Part, tied: bool) -> tuple[str, str]:
    """Return kind and reason of a tensor outside the blocks."""
    if part.name.endswith(_BUFFERS):
        return "other", "table computed from the config"
    if part.name.endswith(_HEAD_FACTORS):
        return "head", "factor of the head: outside the blocks"
    if part.name.endswith(_HEAD_BIASES):
        return "head", "bias of the head: outside the blocks"
    if part.name.endswith(_HEADS) or part.name == "head.weight":
        return ("tied", "second copy of the embedding: tied, counted once") if tied else ("head", "head: outside the blocks")
    if len(part.shape) == 1:
        return "vector", "vector of a norm" if "norm" in part.name or "ln_" in part.name else "vector"
    if _is_table(part.name) and len(part.shape) == 2:
        both = tied and not _POSITIONS.search(part.name)
        return ("tied", "embedding, and the head too: tied") if both else ("embedding", "embedding")
    return "outside", "outside the blocks"


def _is_table(name: str) -> bool:
    return ("embed" in name.replace("unembed", "") or ".wte." in f".{name}" or ".wpe." in f".{name}") and not name.endswith(_HEADS)


def _inside(part: Part, checkpoint: Checkpoint, *, experts: bool) -> tuple[str, str]:
    """Return kind and reason of a tensor in a block; no reason for the matrix of a linear layer."""
    if part.name.endswith(_BUFFERS) and len(part.shape) != 1:
        return "other", "table computed from the config"
    if not prod(part.shape):
        return "other", "empty: makes transformers refuse the folder without our package"
    for layer, replaced in _replaced(checkpoint).items():
        if _in_block(part.name).startswith(layer):
            return replaced
    if f"{part.module.rpartition('.')[0]}.A_log" in checkpoint.names and part.module.endswith(".dt_proj"):
        return "unreached", "read by its weight, not called as a layer"  # of Mamba, first version
    kind = kind_by_name(part.path, _mapped(part.shape, checkpoint), experts=experts)
    if kind == "vector":
        return kind, "vector of a norm" if "norm" in part.path or "ln_" in part.path else "vector"
    return kind, "" if kind in ("linear", "expert") else _WHY.get(kind, KINDS[kind].why)


def _mapped(shape: tuple[int, ...], checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the shape of a matrix as (d_out, d_in), however it is stored."""
    return shape[::-1] if len(shape) == 2 and checkpoint.config.get("model_type") in _TRANSPOSED else shape


def _replaced(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return the beginnings of names whose weights are factors, with kind and reason."""
    # Their path in the block tells: transformers saves some models under other names than its modules have.
    words = {"dense": "dense, quantised already"}
    return {
        f"{_in_block(name)}.": ("lowrank", words.get(str(entry.get("form")), "factor: low-rank already"))
        for name, entry in _low_rank_layers(checkpoint).items()
    }


def _in_block(name: str) -> str:
    """Return a name from the number of its block on."""
    match = _NUMBERED.match(name)
    return f"{match['depth']}.{match['path']}" if match else name


def _low_rank_layers(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, object]]:
    """Return the layers that are stored as factors, by name, with their entries; those of the plain form have empty ones."""
    plain = checkpoint.config.get("lowrank_ranks")
    return {str(name): {} for name in plain} if isinstance(plain, dict) else _guarded_layers(checkpoint)


def _guarded_layers(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, object]]:
    """Return the layers that are compressed in our own form."""
    quantised = checkpoint.config.get("quantization_config")
    layers = quantised.get("layers") if isinstance(quantised, dict) and quantised.get("quant_method") == "lowrank" else None
    return {str(name): entry if isinstance(entry, dict) else {} for name, entry in layers.items()} if isinstance(layers, dict) else {}


def _with_bias(part: Part, matrices: Mapping[str, str]) -> Part:
    """A bias of a linear layer is counted with its matrix."""
    kind = matrices.get(part.module) if part.name.endswith(".bias") else None
    if kind is None:
        return part
    return replace(part, kind=kind, why="bias: counted with its matrix, kept as it is" if kind in ("linear", "expert") else KINDS[kind].why)


def _blocks_with_experts(tensors: Sequence[StoredTensor], stem: str) -> set[int]:
    paths: dict[int, list[str]] = {}
    for tensor in tensors:
        match = _NUMBERED.match(tensor.name)
        if match is not None and match["stem"] == stem:
            paths.setdefault(int(match["depth"]), []).append(match["path"])
    return {depth for depth, result in paths.items() if has_experts(result)}


def _place(part: Part) -> tuple[int, int, int, str]:
    if part.block is None:
        return (0 if "embed" in part.name or "wte" in part.name or "wpe" in part.name else 2), 0, 0, part.name
    # Attention comes before the feed-forward part, and what is left after both, in every family of decoders.
    half = 1 if "attn" in part.path or "attention" in part.path else 3 if "mlp" in part.path or "fc" in part.path else 0
    half = 2 if "post" in part.path or "ln_2" in part.path or "final" in part.path else half
    place = next((index for index, word in enumerate(_ORDER) if word in part.path.rpartition(".")[0].rpartition(".")[2]), len(_ORDER))
    return 1, part.block, half * 100 + place, part.path


def checkpoint_facts(checkpoint: Checkpoint, parts: Sequence[Part] | None = None) -> ModelFacts:
    """Return the facts known from headers; types and shared inputs by module names."""
    parts = parts_of(checkpoint) if parts is None else parts
    matrices = _matrices(checkpoint, parts)
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    return ModelFacts(
        reference=str(checkpoint.folder),
        architecture=_architecture(checkpoint.config),
        dtype=", ".join(sorted({part.dtype for part in parts if part.parameters})),
        stored_dtype=checkpoint.stored_dtype,
        parameters=sum(part.parameters for part in parts),
        compressible_parameters=sum(matrix.dense_parameters for matrix in matrices),
        bytes=sum(stored[part.name].bytes for part in parts if part.parameters),
        vocabulary=checkpoint.number("vocab_size"),
        max_context=checkpoint.number("max_position_embeddings", "n_positions", "max_seq_len") or None,
        blocks=len({part.block for part in parts if part.block is not None}),
        hidden=checkpoint.number("hidden_size", "n_embd", "d_model"),
        tied_embeddings=_tied(checkpoint),
        matrices=matrices,
        coverage=Coverage.of((part.kind, part.parameters) for part in parts),
        input_widths={matrix.input_group: matrix.d_in for matrix in reversed(matrices)},
    )


def _architecture(config: Mapping[str, object]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(config.get("model_type", ""))


def _matrices(checkpoint: Checkpoint, parts: Sequence[Part]) -> tuple[MatrixShape, ...]:
    linears = [part for part in parts if part.compressible and part.kind == "linear"]
    biases = {part.module for part in parts if part.name.endswith(".bias")}
    paths: dict[int, list[str]] = {}
    for part in linears:
        paths.setdefault(part.block or 0, []).append(part.type)
    groups: dict[tuple[int, str], str] = {}
    result = []
    for part in linears:
        depth = part.block or 0
        d_out, d_in = _mapped(part.shape, checkpoint)
        parent, _, last = part.type.rpartition(".")
        shared = f"{parent}.{_SHARED_INPUTS[last]}" if last in _SHARED_INPUTS else part.type
        group = groups.setdefault((depth, shared), part.module)
        result.append(MatrixShape(part.module, module_type(part.type, paths[depth]), depth, d_out, d_in, part.module in biases, group))
    return (*result, *expert_matrices(checkpoint, [part for part in parts if part.kind == "expert"]))


def tensor_table(parts: Sequence[Part]) -> pd.DataFrame:
    """Return a row for each tensor: name, block, shape, dtype, parameters, their share, treatment, file."""
    total = max(1, sum(part.parameters for part in parts))
    frame = frame_of(
        parts,
        tensor="name",
        block="block",
        shape=lambda part: " × ".join(str(size) for size in part.shape),
        dtype="dtype",
        parameters="parameters",
        share=lambda part: part.parameters / total,
        compressible="compressible",
        kind=lambda part: KINDS[part.kind].label,
        why="why",
        file="file",
    )
    return frame.astype({"block": "Int64"})

"""Folders of low-rank factors that other projects write: which form it is, at which ranks, under which names. Torch-free.

Each form is two linear layers for one, y = up (down x) + bias, and so our plain form under other names: W ~ up down, with ``up``
(d_out, r) and ``down`` (r, d_in). Their code is never run, and nothing but safetensors is read.

| project | ranks in ``config.json`` | tensors of the layer X |
| --- | --- | --- |
| LEMS | ``rank_dict``; the dense model's own config in ``base_config`` | ``wrapped_model.X.mod_a``, ``.mod_b``, bias ``X.bias`` |
| ASVD (ASVD4LLM) | ``truncation_ranks`` | ``X.BLinear``, ``X.ALinear`` with the bias |
| LowRankArena | ``low_rank_modules`` (a rank, or an object with one) | as ASVD |
| LowRankArena, SVD-LLM | ``svd_ranks`` | ``X.v_proj``, ``X.u_proj`` with the bias |
| LowRankArena, SVD-LLM | none: the tensors tell | ``q_v_proj``, ``q_u_proj`` for X = ``q_proj``; ``fc1_v_proj`` for ``fc1`` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lowrank_core.errors import ModelError
from lowrank_core.files.weights import read_object, weight_files

__all__ = ["RANK_KEYS", "ForeignFolder", "foreign_ranks", "read_foreign"]

RANK_KEYS = ("rank_dict", "truncation_ranks", "low_rank_modules", "svd_ranks")
"""Keys of the ranks that others write: layer -> rank, in the config of a folder, or in a file of ranks alone."""

_AS_CHILDREN = r"(?P<layer>.+)\.{}\.(?P<leaf>weight|bias)"
_FACTORS = {
    "rank_dict": ("LEMS", (_AS_CHILDREN.format("(?P<half>mod_[ab])"), r"(?P<layer>.+)(?P<half>)\.(?P<leaf>bias)"), ("mod_a", "mod_b")),
    "truncation_ranks": ("ASVD", (_AS_CHILDREN.format("(?P<half>[AB]Linear)"),), ("BLinear", "ALinear")),
    "low_rank_modules": ("LowRankArena", (_AS_CHILDREN.format("(?P<half>[AB]Linear)"),), ("BLinear", "ALinear")),
    "svd_ranks": ("SVD-LLM", (_AS_CHILDREN.format("(?P<half>[uv]_proj)"),), ("v_proj", "u_proj")),
    "": ("SVD-LLM", (r"(?P<layer>.+)_(?P<half>[uv]_proj)\.(?P<leaf>weight|bias)",), ("v_proj", "u_proj")),
}
"""Key of the config -> project, how a tensor of a factor is named, and the names of ``down`` and ``up``."""

_WRAPPER = "wrapped_model."
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ForeignFolder:
    """Headers of a folder that another project wrote.

    Attributes:
        project: whose form it is.
        config: of the dense architecture, with the keys of our plain form.
        shapes: (d_out, d_in) of each layer that is stored as factors.
        names: name in the files -> name in the plain form, of every tensor that has another there.
    """

    project: str
    config: Mapping[str, object]
    shapes: Mapping[str, tuple[int, int]]
    names: Mapping[str, str]


def foreign_ranks(body: Mapping[str, object]) -> object:
    """Return layer -> rank of a JSON object that another project wrote, unchecked; None where it is no such object."""
    ranks = next((body[key] for key in RANK_KEYS if key in body), None)
    if not isinstance(ranks, dict):
        return ranks
    return {str(name): rank.get("rank") if isinstance(rank, dict) else rank for name, rank in ranks.items()}


def read_foreign(folder: Path) -> ForeignFolder | None:
    """Return the headers of a folder in the form of another project; None for every other folder.

    Raises:
        ModelError: it lacks one of two factors, they don't fit each other or the ranks in its config, or it has no safetensors.
    """
    try:
        body = read_object(folder / "config.json")
    except ModelError:
        return None  # it is refused where it is read
    ranks = foreign_ranks(body)
    if ranks is not None and not (isinstance(ranks, dict) and ranks):
        raise ModelError(f"config.json of {folder} must map layer names to ranks, and holds {str(ranks)[:80]!r}. Copy the model again.")
    if ranks is None and (_is_ours(body) or not _may_be_named_by_tensors(folder)):
        return None
    stored = _shapes(folder)
    project, patterns, halves = _FACTORS[next((key for key in RANK_KEYS if key in body), "")]
    plain = {name: name.removeprefix(_WRAPPER) for name in stored}
    factors = {name: part for name in stored if (part := _part_of(plain[name], patterns, halves, ranks)) is not None}
    if not factors and ranks is None:
        return None
    plain |= {name: f"{layer}.{part}" for name, (layer, part) in factors.items()}
    under = {new: stored[old] for old, new in plain.items()}
    layers = dict.fromkeys(layer for layer, _ in factors.values()) | dict.fromkeys(ranks or ())
    shapes = {layer: _checked(layer, under, None if ranks is None else ranks.get(layer), ranks is None, folder) for layer in layers}
    found = {layer: under[f"{layer}.down.weight"][0] for layer in layers}
    biases = [layer for layer in layers if f"{layer}.up.bias" in under]
    return ForeignFolder(project, _plain_config(body, found, biases), shapes, {old: new for old, new in plain.items() if old != new})


def _is_ours(body: Mapping[str, object]) -> bool:
    return "quantization_config" in body or "lowrank_ranks" in body


def _may_be_named_by_tensors(folder: Path) -> bool:
    try:
        return any(name.endswith("_u_proj.weight") for name in _shapes(folder))
    except ModelError:
        return False  # as above


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder).loaded:
        try:
            with safe_open(folder / name, framework="numpy") as archive:
                result |= {key: tuple(archive.get_slice(key).get_shape()) for key in archive.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / name} is damaged or cut short. Save or download the checkpoint again.") from error
    return result


def _part_of(name: str, patterns: tuple[str, ...], halves: tuple[str, str], ranks: Mapping[str, object] | None) -> tuple[str, str] | None:
    """Return layer and name of a factor's tensor in the plain form; None of a tensor that is no factor's."""
    match = next((match for pattern in patterns if (match := re.fullmatch(pattern, name))), None)
    if match is None or (not match["half"] and match["layer"] not in (ranks or ())):
        return None
    layer = match["layer"]
    if ranks is None and not re.search(r"\.fc\d+$", layer):
        layer += "_proj"
    return layer, f"{'down' if match['half'] == halves[0] else 'up'}.{match['leaf']}"


def _checked(layer: str, shapes: _Shapes, rank: object, by_tensors: bool, folder: Path) -> tuple[int, int]:
    """Return (d_out, d_in) of a layer whose factors fit each other, and the rank that the config gives it."""
    up, down = (shapes.get(f"{layer}.{half}.weight") for half in ("up", "down"))
    if up is None or down is None:
        half = "both factors" if up is down else "one of the two factors"
        raise ModelError(f"{folder} lacks {half} of the layer {layer!r}. Copy or download the model again.")
    if len(up) != 2 or len(down) != 2 or up[1] != down[0] or shapes.get(f"{layer}.up.bias", up[:1]) != up[:1]:
        raise ModelError(f"the factors of {layer!r} in {folder} don't fit each other: {up} by {down}. Copy or download the model again.")
    if not by_tensors and (type(rank) is not int or rank != down[0]):
        said = "names no rank" if rank is None else f"says {rank!r}"
        raise ModelError(f"the factors of {layer!r} in {folder} have rank {down[0]}, and its config.json {said}. Copy the model again.")
    return up[0], down[1]


def _plain_config(body: Mapping[str, object], ranks: Mapping[str, int], biases: list[str]) -> dict[str, object]:
    base = body.get("base_config")
    config = {**base, "model_type": body.get("base_model_type", base.get("model_type"))} if isinstance(base, dict) else dict(body)
    for key in ("auto_map", "architectures", *RANK_KEYS):
        config.pop(key, None)
    return {**config, "lowrank_ranks": dict(ranks), "lowrank_biases": biases, "lowrank_unguarded": True}

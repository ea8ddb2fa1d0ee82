"""Matrices of experts in a checkpoint's headers: one tensor each, or all of a mixture in one. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from lowrank_core.parameters import MatrixShape
from lowrank_core.studio.overview.headers import Checkpoint

__all__ = ["expert_matrices"]

_ONE = re.compile(r"^(?P<mixture>.+)\.(?P<expert>\d+)\.(?P<layer>[^.]+)\.weight$")
_LAYERS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "num_experts_per_token")


class _Part(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def expert_matrices(checkpoint: Checkpoint, parts: Sequence[_Part]) -> Iterator[MatrixShape]:
    """Yield the matrices of the tensors of experts; how many experts a token is sent to comes from the config."""
    chosen = checkpoint.number(*_CHOSEN)
    counts: dict[tuple[int | None, str], int] = {}
    for part in parts:
        if match := _ONE.match(part.path):
            key = part.block, match["mixture"]
            counts[key] = max(counts.get(key, 0), int(match["expert"]) + 1)
    names = {part.name for part in parts}
    for part in parts:
        match = _ONE.match(part.path)
        bias = {f"{part.name}_bias", f"{part.name.removesuffix('.weight')}.bias"} & names
        if match and len(part.shape) == 2:
            share = _share(chosen, counts[part.block, match["mixture"]])
            layer = _LAYERS.get(match["layer"], match["layer"])
            yield replace(_matrix(part, match["mixture"], int(match["expert"]), layer, part.shape, share), bias=bool(bias))
        elif len(part.shape) == 3:
            for matrix in _of_all(part, checkpoint.number("hidden_size", "n_embd", "d_model"), chosen):
                yield replace(matrix, bias=bool(bias))


def _of_all(part: _Part, hidden: int, chosen: int) -> Iterator[MatrixShape]:
    """Yield the matrices of a tensor that holds those of all experts: (E, d_out, d_in), or transposed."""
    count, *sides = part.shape
    mixture, _, leaf = part.path.removesuffix(".weight").rpartition(".")
    wide = sides[1] if sides[0] == hidden else sides[0]
    if "gate_up" in leaf:
        layers = {"gate": (wide // 2, hidden), "up": (wide // 2, hidden)}
    elif leaf in ("up_proj", "down_proj"):
        layers = {leaf.removesuffix("_proj"): (wide, hidden) if leaf == "up_proj" else (hidden, wide)}
    else:
        layers = {leaf: (sides[0], sides[1])}
    for expert in range(count):
        for layer, shape in layers.items():
            yield _matrix(part, mixture, expert, layer, shape, _share(chosen, count))


def _matrix(part: _Part, mixture: str, expert: int, layer: str, shape: tuple[int, ...], share: float) -> MatrixShape:
    stem = f"{part.name.removesuffix(part.path)}{mixture}.{expert}"
    kind = f"{mixture.rpartition('.')[2]}.{layer}"
    first = f"{stem}.gate" if layer in ("gate", "up") else f"{stem}.{layer}"
    return MatrixShape(f"{stem}.{layer}", kind, part.block or 0, shape[0], shape[1], False, first, expert, share)


def _share(chosen: int, count: int) -> float:
    return min(1.0, chosen / count) if chosen else 1.0

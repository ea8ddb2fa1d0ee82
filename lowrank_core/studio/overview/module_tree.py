"""Module tree of a checkpoint, by block or by type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_core.studio.overview.checkpoint import Part

__all__ = ["ARRANGEMENTS", "Node", "module_tree"]

ARRANGEMENTS = {"block": "By block", "type": "By type"}
_BEFORE, _AFTER = "Before the blocks", "After the blocks"


@dataclass(frozen=True)
class Node:
    """A branch of the tree, or a tensor.

    Attributes:
        tensors, parameters, compressible: how many tensors are below it, their parameters, and those of compressible matrices.
        share: of the whole model's parameters.
        shape, dtype, why: of a tensor; what all tensors below agree on, else empty.
    """

    label: str
    tensors: int
    parameters: int
    compressible: int
    share: float
    shape: str
    dtype: str
    why: str
    children: tuple[Node, ...] = ()


def module_tree(parts: Sequence[Part], arrangement: str = "block") -> Node:
    """Return the tree of ``parts``: the blocks with what is in each of them, or each type with its blocks."""
    total = max(1, sum(part.parameters for part in parts))
    inside = [part for part in parts if part.block is not None]
    first = next((index for index, part in enumerate(parts) if part.block is not None), len(parts))
    before = [part for part in parts[:first] if part.block is None]
    after = [part for part in parts[first:] if part.block is None]
    branches = _outside(_BEFORE, before, total)
    branches += _blocks(inside, total) if arrangement == "block" else _types(inside, total)
    branches += _outside(_AFTER, after, total)
    return _branch("Whole model", branches, total)


def _outside(label: str, parts: Sequence[Part], total: int) -> list[Node]:
    leaves = [_leaf(part, part.name, total) for part in parts]
    return leaves if len(leaves) < 2 else [_branch(label, leaves, total)]


def _blocks(parts: Sequence[Part], total: int) -> list[Node]:
    return [
        _branch(f"Block {block}", [_modules(part, alike, total) for part, alike in _grouped(members, _submodule)], total)
        for block, members in _grouped(parts, lambda part: str(part.block))
    ]


def _modules(name: str, parts: Sequence[Part], total: int) -> Node:
    if len(parts) == 1:
        return _leaf(parts[0], parts[0].path, total)
    return _branch(name, [_leaf(part, part.path.removeprefix(f"{name}."), total) for part in parts], total)


def _types(parts: Sequence[Part], total: int) -> list[Node]:
    return [
        _branch(path, [_leaf(part, f"block {part.block}", total) for part in alike], total)
        for path, alike in _grouped(parts, lambda part: part.path)
    ]


def _submodule(part: Part) -> str:
    return part.path.partition(".")[0]


def _grouped(parts: Sequence[Part], key: Callable[[Part], str]) -> list[tuple[str, list[Part]]]:
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    return list(groups.items())


def _leaf(part: Part, label: str, total: int) -> Node:
    shape = " × ".join(str(size) for size in part.shape) or "scalar"
    compressible = part.parameters if part.compressible else 0
    return Node(label, 1, part.parameters, compressible, part.parameters / total, shape, part.dtype, part.why)


def _branch(label: str, children: Sequence[Node], total: int) -> Node:
    parameters = sum(child.parameters for child in children)

    def agreed(values: Sequence[str]) -> str:
        return values[0] if len(set(values)) == 1 else ""

    return Node(
        label,
        sum(child.tensors for child in children),
        parameters,
        sum(child.compressible for child in children),
        parameters / total,
        agreed([child.shape for child in children]),
        agreed([child.dtype for child in children]),
        agreed([child.why for child in children]),
        tuple(children),
    )

"""Module tree of a checkpoint, by block or by type, as data and as collapsible HTML without a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lowrank_core.studio.overview.checkpoint import Part
from lowrank_core.studio.shared.chart_style import BLUE, GREY
from lowrank_core.studio.shared.formatting import count, percent

__all__ = ["ARRANGEMENTS", "Node", "module_tree", "tree_html"]

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


_STYLE = f"""<style>
.tree {{ font-size: 0.86rem; line-height: 1.5; overflow-x: auto; }}
.tree .row {{ display: grid; grid-template-columns: minmax(14rem, 2.6fr) 7rem 4rem 5rem 8.5rem minmax(9rem, 2.2fr); gap: 0.6rem;
  min-width: 50rem; padding: 0.12rem 0.3rem; border-bottom: 1px solid rgba(128, 128, 128, 0.18); align-items: baseline; }}
.tree .head {{ opacity: 0.65; }}
.tree .number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.tree .bar {{ display: inline-block; width: 3.6rem; height: 0.5rem; margin-right: 0.4rem; background: rgba(128, 128, 128, 0.2); }}
.tree .bar i {{ display: block; height: 100%; background: {GREY}; }}
.tree .bar i b {{ display: block; height: 100%; background: {BLUE}; }}
.tree .quiet {{ opacity: 0.65; }}
.tree summary {{ cursor: pointer; list-style: none; }}
.tree summary::-webkit-details-marker {{ display: none; }}
.tree summary .name::before {{ content: "▸"; display: inline-block; width: 1rem; opacity: 0.6; }}
.tree details[open] > summary .name::before {{ content: "▾"; }}
.tree .name {{ overflow-wrap: anywhere; }}
</style>"""
_INDENT, _MARK = 0.9, 1.0  # rem: for each level, and for the mark that folds a branch


def tree_html(root: Node) -> str:
    """Return ``root`` as nested ``details``; its first level is open. Bars: share of the model, what is compressible of it in blue."""
    head = _cells("Module", "Shape", "Dtype", "Parameters", "Share of the model", "Treatment")
    return f'{_STYLE}<div class="tree"><div class="row head">{head}</div>{_node(root, 0)}</div>'


def _node(node: Node, level: int) -> str:
    row = _row(node, level)
    if not node.children:
        return f'<div class="row leaf">{row}</div>'
    inside = "".join(_node(child, level + 1) for child in node.children)
    return f'<details{" open" if level == 0 else ""}><summary><div class="row">{row}</div></summary>{inside}</details>'


def _row(node: Node, level: int) -> str:
    tensors = f' <span class="quiet">{node.tensors} {"tensor" if node.tensors == 1 else "tensors"}</span>' if node.children else ""
    indent = _INDENT * level + (0.0 if node.children else _MARK)
    name = f'<span class="name" style="padding-left: {indent:.1f}rem">{escape(node.label)}{tensors}</span>'
    bar = f'<span class="bar" aria-hidden="true"><i style="width: {100 * node.share:.2f}%">{_blue(node)}</i></span>{percent(node.share)}'
    return (
        f'{name}<span>{escape(node.shape)}</span><span>{escape(node.dtype)}</span><span class="number">{count(node.parameters)}</span>'
        f"<span>{bar}</span><span>{escape(_fate(node))}</span>"
    )


def _blue(node: Node) -> str:
    inside = node.compressible / node.parameters if node.parameters else 0.0
    return f'<b style="width: {100 * inside:.2f}%"></b>'


def _fate(node: Node) -> str:
    if node.compressible == node.parameters and node.parameters:
        return "compressible"
    if not node.compressible:
        return f"not compressed{': ' + node.why if node.why else ''}"
    return f"{percent(node.compressible / node.parameters)} compressible"


def _cells(*words: str) -> str:
    return "".join(f'<span class="{"number" if word == "Parameters" else ""}">{word}</span>' for word in words)

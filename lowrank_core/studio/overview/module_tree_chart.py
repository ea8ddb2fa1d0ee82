"""The module tree as collapsible HTML without a script."""

from __future__ import annotations

from html import escape

from lowrank_core.studio.overview.module_tree import Node
from lowrank_core.studio.shared.chart_style import BLUE, GREY
from lowrank_core.studio.shared.formatting import count, percent

__all__ = ["tree_html"]

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

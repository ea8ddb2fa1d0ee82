"""Tables of all registries. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.config.options import Declared
from lowrank_core.metrics import METRICS, ErrorMetric
from lowrank_core.presets.differences import COMMON
from lowrank_core.presets.recipes import PRESETS

__all__ = ["allocator_table", "as_markdown", "basis_table", "difference_table", "methods", "preset_table", "registered", "sentence_of"]

Table = list[dict[str, str]]


def registered(name: str) -> dict[str, str]:
    """Return name -> label of what a registry has for the option ``name``; empty where none has."""
    if name == "basis":
        return {key: metric.label for key, metric in METRICS.items()}
    return {key: rule.label for key, rule in ALLOCATORS.items()} if name == "allocation" else {}


def sentence_of(declared: Declared) -> str:
    """Return what an option is in a line: its choices, then its help."""
    choices = declared.option.choices or registered(declared.name)
    listed = f"one of {', '.join(choices)}; " if choices and declared.type is str else ""
    return f"{listed}{declared.option.help}"


def _needs(basis: ErrorMetric) -> str:
    needs = {"inputs": basis.needs_data, "gradients": basis.needs_gradients, "block by block": basis.sequential}
    return ", ".join(name for name, needed in needs.items() if needed) or "weights alone"


def basis_table() -> Table:
    """Return a row for each basis: its name, label, what it needs, and its source."""
    return [
        {"basis": f"`{name}`", "method": basis.label, "works from": _needs(basis), "source": basis.reference}
        for name, basis in METRICS.items()
    ]


def allocator_table() -> Table:
    """Return a row for each allocator."""
    return [{"allocation": f"`{name}`", "method": rule.label, "source": rule.reference} for name, rule in ALLOCATORS.items()]


def preset_table() -> Table:
    """Return a row for each preset: what it is made of."""
    return [
        {
            "preset": f"`{name}`",
            "method": preset.label,
            "basis": f"`{preset.compression.basis}`",
            "storage": preset.compression.storage,
            "ranks": f"`{preset.allocation}`",
            "source": preset.reference,
        }
        for name, preset in PRESETS.items()
    ]


def difference_table() -> Table:
    """Return a row for each preset that is named after a paper: where it departs from it."""
    return [
        {"preset": f"`{name}`", "differs from paper or published code": preset.differs}
        for name, preset in PRESETS.items()
        if preset.differs
    ]


def as_markdown(rows: Iterable[dict[str, str]]) -> str:
    """Return rows of the same keys as a Markdown table."""
    table = list(rows)
    names, lines = list(table[0]), [list(row.values()) for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *lines])


def methods() -> dict[str, object]:
    """Return every registry, and as ``text`` their tables."""
    tables = {"bases": basis_table(), "allocations": allocator_table(), "presets": preset_table(), "differences": difference_table()}
    return {**tables, "common_differences": COMMON, "text": "\n\n".join([*map(as_markdown, tables.values()), COMMON])}

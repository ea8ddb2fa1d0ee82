"""What text a run saw: its splits, from text.json."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lowrank_core.files.records import build
from lowrank_core.runs import Run

__all__ = ["SplitFacts", "TextFacts", "split_table", "text_facts"]


@dataclass(frozen=True)
class SplitFacts:
    """One of the disjoint splits; ``sha256`` is of its tokens."""

    name: str
    windows: int
    tokens: int
    available_tokens: int | None = None
    sha256: str = ""


@dataclass(frozen=True)
class TextFacts:
    """A text as it was cut; ``bos`` is ``window`` (BOS first in every window) or ``none``."""

    reference: str
    context: int
    bos: str
    seed: int
    splits: tuple[SplitFacts, ...]
    preview: str = ""


def text_facts(run: Run) -> TextFacts | None:
    """Return the facts in text.json, or None before the text was cut.

    Raises:
        RunError: the file is damaged.
    """
    body = run.part("text")
    if body is None:
        return None
    splits = tuple(build(SplitFacts, split, "text.json", name=name) for name, split in body.get("splits", {}).items())
    return build(TextFacts, body, "text.json", splits=splits)


def split_table(facts: TextFacts) -> pd.DataFrame:
    """Return a row for each split: windows, tokens, share of the split's tokens that was used, hash."""
    rows = [
        {
            "split": split.name,
            "windows": split.windows,
            "tokens": split.tokens,
            "available": split.available_tokens,
            "sha256": split.sha256[:12],
        }
        for split in facts.splits
    ]
    return pd.DataFrame(rows, columns=["split", "windows", "tokens", "available", "sha256"])

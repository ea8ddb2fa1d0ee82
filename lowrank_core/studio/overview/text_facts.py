"""Splits of a run's text, from text.json."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_core.config.mapping import build
from lowrank_core.runs import Run
from lowrank_core.studies.published import ALLOCATIONS
from lowrank_core.studio.shared.table import Column, Table, filled

__all__ = ["SplitFacts", "TextFacts", "TrialWindows", "bos_words", "splits_spec", "text_facts", "trial_windows"]


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
    """A text as it was cut; ``bos`` is ``window`` (BOS in every window) or ``none``; ``warnings`` say which splits are no new text."""

    reference: str
    context: int
    bos: str
    seed: int
    splits: tuple[SplitFacts, ...]
    preview: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The protocol of the splits, in a line."""
        return f"{self.reference} · context {self.context} tokens · {bos_words(self.bos)} · seed {self.seed} · three disjoint splits"


def bos_words(rule: str) -> str:
    return "BOS first in every window" if rule == "window" else "no BOS"


def text_facts(run: Run) -> TextFacts | None:
    """Return the facts in text.json; None before the text is tokenised.

    Raises:
        RunError: the file is damaged.
    """
    body = run.part("text")
    if body is None:
        return None
    splits = tuple(build(SplitFacts, split, "text.json", name=name) for name, split in body.get("splits", {}).items())
    return build(TextFacts, body, "text.json", splits=splits)


@dataclass(frozen=True)
class TrialWindows:
    """Search-validation windows that trials see; ``pool``: of how many a search as published selected them, 0 elsewhere."""

    count: int
    context: int
    pool: int = 0

    @property
    def words(self) -> str:
        """Return them in words, for a protocol."""
        plain = f"{self.count} windows of {self.context} tokens"
        if self.pool <= self.count:
            return plain
        return f"{plain} (of {self.pool} those whose perplexity varies most over {ALLOCATIONS} random allocations)"


def trial_windows(run: Run) -> TrialWindows | None:
    """Return the windows that trials of ``run`` see, or None before they are known.

    Raises:
        RunError: a file of the run is damaged.
    """
    facts, selection, search = text_facts(run), run.part("selection"), run.config.search
    split = next((split for split in facts.splits if split.name == "validation"), None) if facts else None
    if facts is None or split is None:
        return None
    if search is None or not search.selected_windows:
        return TrialWindows(split.windows, facts.context)
    return None if selection is None else TrialWindows(len(selection["chosen"]), facts.context, int(selection["pool"]))


def splits_spec(facts: TextFacts) -> Table:
    """Return a row for each split: windows, tokens, those of the split in all, hash."""
    columns = (
        Column.text("split", "Split").of("name"),
        Column.whole("windows", "Windows"),
        Column.whole("tokens", "Tokens"),
        Column.whole("available", "Available tokens").of("available_tokens"),
        Column.text("sha256", "SHA-256 (first 12)", "Of the tokens: equal hashes mean equal text.").of(lambda split: split.sha256[:12]),
    )
    caption = "Three disjoint splits: calibration (statistics), validation (what a search sees), test (what is reported)"
    return Table(filled(facts.splits, columns), columns, caption, "splits")

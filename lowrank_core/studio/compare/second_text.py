"""Quality on the calibration text against a second text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.table import Column, Table

__all__ = ["OtherText", "other_text", "other_text_spec"]

_COLUMNS = (
    *("name", "own", "own_dense", "own_ratio", "own_low", "own_high"),
    *("other", "other_dense", "other_ratio", "other_low", "other_high", "kl_own", "kl_other"),
)


@dataclass(frozen=True)
class OtherText:
    """Models on two texts.

    Attributes:
        own, other: names of the texts.
        own_protocol, other_protocol: how each was measured.
        frame: a row for each model, the lowest ratio on the other text first: name; perplexity on each text (``own``, ``other``), the
            original's (``…_dense``), compressed / original (``…_ratio``) with 95 % intervals (``…_low``, ``…_high``); KL on each.
    """

    own: str
    other: str
    own_protocol: str
    other_protocol: str
    frame: pd.DataFrame

    @property
    def own_name(self) -> str:
        return self.own or "the run's text"

    @property
    def protocol(self) -> str:
        return f"{self.own_protocol or f'On {self.own_name} not measured'}. {self.other_protocol}."

    @property
    def words(self) -> str:
        """The largest gap between both texts, in a sentence."""
        both = self.frame.dropna(subset=["own_ratio", "other_ratio"])
        if both.empty:
            return "No model was measured on both texts yet."
        row = both.iloc[int((both["other_ratio"] / both["own_ratio"]).argmax())]
        return (
            f"Largest gap: {row['name']} has {number(row['own_ratio'], 4)} times the dense model's perplexity on {self.own}, and "
            f"{number(row['other_ratio'], 4)} times on {self.other}{_resolved(row)}."
        )


def _resolved(row: pd.Series) -> str:
    """Return whether the intervals of a gap overlap, in words; empty without intervals."""
    if row[["own_low", "own_high", "other_low", "other_high"]].isna().any():
        return ""
    apart = row["own_high"] < row["other_low"] or row["other_high"] < row["own_low"]
    return "; the intervals do not overlap" if apart else "; the intervals overlap, so that these windows do not tell them apart"


def other_text(own: Sequence[Comparison], other: Sequence[Comparison]) -> OtherText | None:
    """Return the models measured on the other text, with their results on the run's own; None without any."""
    if not other:
        return None
    known = {comparison.key: comparison for comparison in own}
    rows = [_row(known.get(comparison.key), comparison) for comparison in other]
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    frame = frame.astype({name: float for name in _COLUMNS if name != "name"}).sort_values("other_ratio", ignore_index=True)
    first = next((known[comparison.key] for comparison in other if comparison.key in known), own[0] if own else None)
    return OtherText(
        own=first.dataset if first else "",
        other=other[0].dataset,
        own_protocol=first.protocol if first else "",
        other_protocol=other[0].protocol,
        frame=frame,
    )


def _row(own: Comparison | None, other: Comparison) -> dict[str, object]:
    row: dict[str, object] = {"name": own.name if own else other.name}
    for prefix, comparison in (("own", own), ("other", other)):
        if comparison is None:
            continue
        low, high = comparison.perplexity_ratio_interval or (None, None)
        row |= {
            prefix: comparison.perplexity,
            f"{prefix}_dense": comparison.dense_perplexity,
            f"{prefix}_ratio": comparison.perplexity / comparison.dense_perplexity,
            f"{prefix}_low": low,
            f"{prefix}_high": high,
            f"kl_{prefix}": comparison.kl,
        }
    return row


def other_text_spec(view: OtherText, number: int = 1) -> Table:
    """Return its frame as it is shown; ``number`` tells several in one report apart."""
    own, ratio = view.own_name, "Compressed over dense; 1 is no loss."
    columns = (
        Column.text("name", "Model", width="medium"),
        Column.number("own_ratio", f"Ratio on {own}", 4, ratio),
        Column.number("other_ratio", f"Ratio on {view.other}", 4, ratio),
        Column.number("own", f"Perplexity, {own}", 3, digits=5),
        Column.number("own_dense", "of the dense model", 3, digits=5),
        Column.number("other", f"Perplexity, {view.other}", 3, digits=5),
        Column.number("other_dense", "of the dense model", 3, digits=5),
        Column.number("kl_own", f"KL, {own} (nats per token)"),
        Column.number("kl_other", f"KL, {view.other} (nats per token)"),
    )
    return Table(view.frame, columns, f"Every model on both texts. {view.protocol}", f"second-text-{number}-models")

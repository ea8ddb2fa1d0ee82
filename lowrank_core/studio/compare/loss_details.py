"""Tables of losses: all models against the dense model, and one model by window and by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.errors import RunError
from lowrank_core.parameters import FLOPS_MEANING
from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.shared.formatting import DASH, interval_words, number
from lowrank_core.studio.shared.table import Column, Getter, Table, filled, frame_of

__all__ = [
    "LOST",
    "SAVED",
    "WindowTable",
    "comparison_table",
    "difference_table",
    "lost_spec",
    "position_table",
    "saved_spec",
    "window_table",
]


def _end(name: str, index: int) -> Getter:
    """Return a getter of an end of the interval ``name``."""
    return lambda each: getattr(each, name)[index] if len(getattr(each, name)) == 2 else None


def _in_words(name: str) -> Getter:
    """Return a getter of the interval ``name`` in words: a dash for the dense model, of which only the perplexity is measured."""
    return lambda each: DASH if each.form == "dense" and name != _INTERVALS[""] else interval_words(getattr(each, name))


def _difference(each: Comparison) -> float | None:
    return None if each.form == "dense" else each.perplexity - each.dense_perplexity


_INTERVALS = {"": "perplexity_interval", "difference_": "perplexity_difference_interval", "kl_": "kl_interval"}
_COLUMNS = {
    column.name: column
    for column in (
        Column.text("allocation", "Model", width="medium").of("name"),
        Column.short("form", "Form"),
        Column.number("perplexity", "Perplexity", 3, digits=5),
        Column.short("interval", "95 %", "Of each perplexity on its own.").of(_in_words("perplexity_interval")),
        Column.number("difference", "Difference", help="Perplexity above the dense model's.", digits=3).of(_difference),
        Column.short("difference_interval", "95 %, paired", "Of the difference, paired by window.").of(
            _in_words("perplexity_difference_interval")
        ),
        Column.number("kl", "KL (nats/token)", help="KL(dense ‖ compressed), nats per token."),
        Column.number("reverse_kl", "Reverse KL", help="KL(compressed ‖ dense), nats per token."),
        Column.share("agreement", "Top-1 agreement", "Tokens where both models rank the same one first.").of("top1_agreement"),
        Column.share("top5", "Top-5", "Overlap of the five most likely tokens of both models.").of("top5_agreement"),
        Column.short("kl_interval", "KL, 95 %").of(_in_words("kl_interval")),
        Column.share("removed", "Removed, linears", digits=2).of("compression_ratio"),
        Column.share("model_removed", "Removed, model", digits=2).of("model_compression_ratio"),
        Column.whole("linears", "Parameters, linears").of("compressible_parameters"),
        Column.whole("parameters", "Parameters, model"),
        Column("bytes", "Size", "bytes"),
        Column.whole("flops", "FLOPs per token", FLOPS_MEANING),
    )
}
SAVED = ("allocation", "form", "removed", "model_removed", "linears", "parameters", "bytes", "flops")
LOST = ("allocation", "form", *(name for name in _COLUMNS if name not in SAVED))
"""Columns of ``comparison_table`` that say what was lost, and what was saved."""

_ENDS = [
    Column.number(f"{prefix}{end}", "").of(_end(name, index))
    for prefix, name in _INTERVALS.items()
    for index, end in enumerate(("low", "high"))
]


def comparison_table(result: Sequence[Comparison]) -> pd.DataFrame:
    """Return the dense model as a first row, then a row for each measured model; ``low`` and ``high`` are 95 % intervals, and
    ``…interval`` the same in words.

    ``difference`` is perplexity above the dense model's, its interval paired by window; ``flops`` those for one token (``FLOPS_MEANING``).
    """
    if not result:
        return pd.DataFrame()
    flops = next((each.dense_flops for each in result if each.dense_flops is not None), None)
    return filled([replace(result[0], dense_flops=flops).dense, *result], [*_COLUMNS.values(), *_ENDS])


def lost_spec(result: Sequence[Comparison], protocol: str) -> Table:
    """Return what ``comparison_table`` says of the loss, as it is shown."""
    caption = f"Quality, dense next to compressed. {protocol}"
    return Table(comparison_table(result), [_COLUMNS[name] for name in LOST], caption, f"test-{result[0].dataset}-{result[0].split}")


def saved_spec(result: Sequence[Comparison]) -> Table:
    """Return what ``comparison_table`` says of sizes, as it is shown."""
    caption, file = (
        "Size: parameters (biases and index tables counted) and bytes",
        f"test-{result[0].dataset}-{result[0].split}-sizes",
    )
    return Table(comparison_table(result), [_COLUMNS[name] for name in SAVED], caption, file)


def difference_table(result: Sequence[Comparison]) -> pd.DataFrame:
    """Return perplexity above the dense model's: columns name, kind, difference, low, high (95 %, paired by window), removed; ascending."""
    frame = frame_of(
        result,
        name="name",
        kind=_kind,
        difference=_difference,
        low=_end("perplexity_difference_interval", 0),
        high=_end("perplexity_difference_interval", 1),
        removed="compression_ratio",
    )
    return frame.astype({"low": float, "high": float}).sort_values("difference", ignore_index=True)


def _kind(comparison: Comparison) -> str:
    if comparison.form == "healed":
        return "healed"
    return "rule" if comparison.given else "searched"


@dataclass(frozen=True)
class WindowTable:
    """Losses of one model by window.

    Attributes:
        frame: columns window, dense, compressed, difference (compressed - dense), in nats per token.
        mean: of the differences; better: share of windows where compression predicts better; worst: that of the largest difference.
    """

    frame: pd.DataFrame
    mean: float
    better: float
    worst: int

    @property
    def words(self) -> str:
        worst = float(self.frame["difference"].max())
        return (
            f"Mean difference {number(self.mean)} nats per token; better than the dense model on {100 * self.better:.0f} % of "
            f"{len(self.frame)} windows; worst on window {self.worst} ({worst:+z.3g})."
        )


def window_table(comparison: Comparison) -> WindowTable | None:
    """Return the windows of a model; None if not recorded."""
    ours, theirs = (np.asarray(values, dtype=float) for values in (comparison.window_nll, comparison.dense_window_nll))
    if not len(ours) or len(ours) != len(theirs):
        return None
    difference = ours - theirs
    frame = pd.DataFrame({"window": np.arange(len(ours)), "dense": theirs, "compressed": ours, "difference": difference})
    return WindowTable(frame, float(difference.mean()), float((difference < 0).mean()), int(difference.argmax()))


@dataclass(frozen=True)
class _Position:
    first: int
    last: int
    tokens: int
    nll: float
    dense_nll: float
    kl: float
    top1_agreement: float


def position_table(comparison: Comparison) -> pd.DataFrame:
    """Return a row for each range of positions: columns context (in words), tokens, nll, dense_nll, extra (NLL above dense), kl, top1.

    Empty where positions were not recorded.

    Raises:
        RunError: an entry is damaged.
    """
    rows = []
    for entry in comparison.by_position:
        if not isinstance(entry, Mapping):
            raise RunError(f"a comparison holds {entry!r} as a range of positions. Measure it again.")
        row = build(_Position, entry, "a comparison by position")
        span = f"{row.first}" if row.first == row.last else f"{row.first}–{row.last}"
        rows.append((span, row.tokens, row.nll, row.dense_nll, row.nll - row.dense_nll, row.kl, row.top1_agreement))
    return pd.DataFrame(rows, columns=["context", "tokens", "nll", "dense_nll", "extra", "kl", "top1"])

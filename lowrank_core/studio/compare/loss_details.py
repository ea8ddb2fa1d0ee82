"""Tables of losses: all models against the dense model, and one model by window and by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.errors import RunError
from lowrank_core.parameters import FLOPS_MEANING
from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.shared.formatting import number
from lowrank_core.studio.shared.table import Column, Table, frame_of, intervals

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

_COLUMNS = {
    column.name: column
    for column in (
        Column.text("allocation", "Model", width="medium"),
        Column.short("form", "Form"),
        Column.number("perplexity", "Perplexity", 3, digits=5),
        Column.short("interval", "95 %", "Of each perplexity on its own."),
        Column.number("difference", "Difference", help="Perplexity above the dense model's.", digits=3),
        Column.short("difference_interval", "95 %, paired", "Of the difference, paired by window."),
        Column.number("kl", "KL (nats/token)", help="KL(dense ‖ compressed), nats per token."),
        Column.number("reverse_kl", "Reverse KL", help="KL(compressed ‖ dense), nats per token."),
        Column.share("agreement", "Top-1 agreement", "Tokens where both models rank the same one first."),
        Column.share("top5", "Top-5", "Overlap of the five most likely tokens of both models."),
        Column.short("kl_interval", "KL, 95 %"),
        Column.share("removed", "Removed, linears", digits=2),
        Column.share("model_removed", "Removed, model", digits=2),
        Column.whole("linears", "Parameters, linears"),
        Column.whole("parameters", "Parameters, model"),
        Column("bytes", "Size", "bytes"),
        Column.whole("flops", "FLOPs per token", FLOPS_MEANING),
    )
}
SAVED = ("allocation", "form", "removed", "model_removed", "linears", "parameters", "bytes", "flops")
LOST = ("allocation", "form", *(name for name in _COLUMNS if name not in SAVED))
"""Columns of ``comparison_table`` that say what was lost, and what was saved."""

_ENDS = ("low", "high", "difference_low", "difference_high", "kl_low", "kl_high")
_WHOLE = ("linears", "parameters", "bytes", "flops")


def comparison_table(result: Sequence[Comparison]) -> pd.DataFrame:
    """Return the dense model as a first row, then a row for each measured model; ``low`` and ``high`` are 95 % intervals, and
    ``…interval`` the same in words.

    ``difference`` is perplexity above the dense model's, its interval paired by window; ``flops`` those for one token (``FLOPS_MEANING``).
    """
    if not result:
        return pd.DataFrame()
    first = result[0]
    low, high = _ends(first.dense_perplexity_interval)
    dense = {"allocation": "Dense", "form": "dense", "perplexity": first.dense_perplexity, "low": low, "high": high}
    dense |= {"removed": 0.0, "model_removed": 0.0, "parameters": first.dense_parameters, "linears": first.dense_compressible_parameters}
    dense |= {"bytes": first.dense_bytes, "flops": next((each.dense_flops for each in result if each.dense_flops is not None), None)}
    columns = [name for name in dict.fromkeys([*LOST, *SAVED, *_ENDS]) if "interval" not in name]
    frame = pd.DataFrame([dense, *(_row(comparison) for comparison in result)], columns=columns)
    numbers = [name for name in columns if name not in ("allocation", "form", *_WHOLE)]
    frame = frame.astype({**dict.fromkeys(numbers, float), **dict.fromkeys(_WHOLE, "Int64")})
    for name, prefix in (("perplexity", ""), ("difference", "difference_"), ("kl", "kl_")):
        frame[f"{prefix}interval"] = intervals(frame, name, f"{prefix}low", f"{prefix}high")
    return frame


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


def _ends(result: Sequence[float]) -> tuple[float | None, float | None]:
    return (result[0], result[1]) if len(result) == 2 else (None, None)


def _row(comparison: Comparison) -> dict[str, object]:
    row: dict[str, object] = {"allocation": comparison.name, "form": comparison.form}
    row |= {"perplexity": comparison.perplexity, "difference": comparison.perplexity - comparison.dense_perplexity}
    row |= {"kl": comparison.kl, "reverse_kl": comparison.reverse_kl}
    row |= {"agreement": comparison.top1_agreement, "top5": comparison.top5_agreement}
    intervals = {
        "": comparison.perplexity_interval,
        "difference_": comparison.perplexity_difference_interval,
        "kl_": comparison.kl_interval,
    }
    for prefix, result in intervals.items():
        row[f"{prefix}low"], row[f"{prefix}high"] = _ends(result)
    return row | {
        "removed": comparison.compression_ratio,
        "model_removed": comparison.model_compression_ratio,
        "parameters": comparison.parameters,
        "linears": comparison.compressible_parameters,
        "bytes": comparison.bytes,
        "flops": comparison.flops,
    }


def difference_table(result: Sequence[Comparison]) -> pd.DataFrame:
    """Return perplexity above the dense model's: columns name, kind, difference, low, high (95 %, paired by window), removed; ascending."""
    frame = frame_of(
        result,
        name="name",
        kind=_kind,
        difference=lambda each: each.perplexity - each.dense_perplexity,
        low=lambda each: _ends(each.perplexity_difference_interval)[0],
        high=lambda each: _ends(each.perplexity_difference_interval)[1],
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

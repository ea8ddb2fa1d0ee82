"""What was lost, as tables: every model next to the dense model, and one model by windows and by positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.errors import RunError
from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.shared.formatting import DASH, interval_words, number

__all__ = ["LOST", "SAVED", "WindowTable", "comparison_table", "difference_table", "position_table", "window_table"]

LOST = (
    *("allocation", "form", "perplexity", "interval", "difference", "difference_interval"),
    *("kl", "reverse_kl", "agreement", "top5", "kl_interval"),
)
SAVED = ("allocation", "form", "removed", "model_removed", "linears", "parameters", "bytes", "flops")
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
    dense = {"allocation": "Original", "form": "dense", "perplexity": first.dense_perplexity, "low": low, "high": high}
    dense |= {"removed": 0.0, "model_removed": 0.0, "parameters": first.dense_parameters, "linears": first.dense_compressible_parameters}
    dense |= {"bytes": first.dense_bytes, "flops": next((each.dense_flops for each in result if each.dense_flops is not None), None)}
    columns = [name for name in dict.fromkeys([*LOST, *SAVED, *_ENDS]) if "interval" not in name]
    frame = pd.DataFrame([dense, *(_row(comparison) for comparison in result)], columns=columns)
    numbers = [name for name in columns if name not in ("allocation", "form", *_WHOLE)]
    frame = frame.astype({**dict.fromkeys(numbers, float), **dict.fromkeys(_WHOLE, "Int64")})
    for name, prefix in (("perplexity", ""), ("difference", "difference_"), ("kl", "kl_")):
        rows = zip(frame[name], frame[f"{prefix}low"], frame[f"{prefix}high"], strict=True)
        frame[f"{prefix}interval"] = [DASH if pd.isna(value) else interval_words((minimum, maximum)) for value, minimum, maximum in rows]
    return frame


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
    rows = [
        (
            comparison.name,
            _kind(comparison),
            comparison.perplexity - comparison.dense_perplexity,
            *_ends(comparison.perplexity_difference_interval),
            comparison.compression_ratio,
        )
        for comparison in result
    ]
    frame = pd.DataFrame(rows, columns=["name", "kind", "difference", "low", "high", "removed"])
    return frame.astype({"low": float, "high": float}).sort_values("difference", ignore_index=True)


def _kind(comparison: Comparison) -> str:
    if comparison.form == "healed":
        return "healed"
    return "rule" if comparison.given else "searched"


@dataclass(frozen=True)
class WindowTable:
    """One model window by window.

    Attributes:
        frame: columns window, original, compressed, difference (compressed - original), in nats per token.
        mean: of the differences; better: share of windows where the compressed model predicts better; worst: where it loses most.
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
    """Return a model's windows; None where they were not recorded."""
    ours, theirs = (np.asarray(values, dtype=float) for values in (comparison.window_nll, comparison.dense_window_nll))
    if not len(ours) or len(ours) != len(theirs):
        return None
    difference = ours - theirs
    frame = pd.DataFrame({"window": np.arange(len(ours)), "original": theirs, "compressed": ours, "difference": difference})
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

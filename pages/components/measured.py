"""What the worker measured, on the Compare page."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.figures.compare import perplexity_figure
from lowrank_core.views.compare import Comparison, Continuation, comparison_table
from lowrank_core.views.formatting import count, interval, number, percent, size
from lowrank_core.views.summary import protocol_of
from pages.components import tables
from pages.components.charts import chart

__all__ = ["show", "show_continuations"]

_WIDTHS = [1.2, 1.2, 0.9, 1.1, 1.1]  # of the cards: the longest labels fit at 1280 pixels


def show(found: Sequence[Comparison], label: str) -> None:
    """Draw the comparison called ``label`` if it was measured (else the best measured), and all of them side by side."""
    shown = next((comparison for comparison in found if comparison.label == label), found[0])
    _headline(shown)
    _sizes(shown)
    st.caption(f"Protocol: {protocol_of(shown)}. Intervals are of 95 %, over windows.")
    chart(
        perplexity_figure(found),
        key="perplexity_bars",
        title="Perplexity of everything measured in this run",
        how="shorter is better; the whiskers are intervals over test windows, which all models share.",
        alt="Bars of test perplexity of the original and each measured allocation",
    )
    _table(found)


def _headline(shown: Comparison) -> None:
    st.subheader(f"Original against {shown.name}", anchor=False)
    change = shown.perplexity - shown.dense_perplexity
    cards = (
        ("Perplexity, original", number(shown.dense_perplexity, 4), _interval(shown.dense_perplexity_interval), None),
        ("Perplexity, compressed", number(shown.perplexity, 4), _interval(shown.perplexity_interval), None),
        ("Difference", f"{change:+.3g}", _interval(shown.perplexity_difference_interval), "Compressed less original, paired by window."),
        ("KL to the original", number(shown.kl), "nats per token", None),
        ("Top-1 agreement", percent(shown.top1_agreement), "of tokens", "Where both models rank the same token first."),
    )
    for column, card in zip(st.columns(_WIDTHS, gap="small"), cards, strict=True):
        with column:
            _card(*card)


def _card(label: str, value: str, below: str, meaning: str | None = None) -> None:
    with st.container(border=True, gap="xxsmall"):
        st.metric(label, value, help=meaning)
        st.caption(below)


def _interval(ends: Sequence[float]) -> str:
    return interval(*ends) if len(ends) == 2 else "–"


def _sizes(shown: Comparison) -> None:
    linears = f"{count(shown.dense_compressible_parameters)} → {count(shown.compressible_parameters)}"
    model = f"{count(shown.dense_parameters)} → {count(shown.parameters)}"
    stored = f"{size(shown.dense_bytes)} → {size(shown.bytes)}"
    cards = (
        ("Compressible linears, parameters", linears, f"{percent(shown.compression_ratio)} removed"),
        ("Whole model, parameters", model, f"{percent(shown.model_compression_ratio)} removed"),
        ("Whole model, bytes", stored, f"{percent(1 - shown.bytes / shown.dense_bytes)} removed"),
    )
    for column, card in zip(st.columns(len(cards), gap="small"), cards, strict=True):
        with column:
            _card(*card)


def _table(found: Sequence[Comparison]) -> None:
    columns = {
        "allocation": tables.text("Allocation"),
        "form": tables.text("Form"),
        "perplexity": tables.number("Perplexity", 3),
        "low": tables.number("from", 3, "Lower end of the 95 % interval."),
        "high": tables.number("to", 3, "Upper end of the 95 % interval."),
        "kl": tables.figure("KL (nats/token)"),
        "agreement": tables.share("Top-1 agreement"),
        "removed": tables.share("Removed, linears"),
        "model_removed": tables.share("Removed, model"),
        "linears": tables.whole("Parameters, linears"),
        "parameters": tables.whole("Parameters, model"),
        "bytes": st.column_config.NumberColumn("Size", format="bytes"),
    }
    tables.table(comparison_table(found), columns, key="comparison_table", alt="All measured allocations")


def show_continuations(found: Sequence[Continuation]) -> None:
    """Draw the newest continuation side by side, the older ones folded away."""
    for position, entry in enumerate(found):
        label = f"trial {entry.trial}" if isinstance(entry.trial, int) else str(entry.trial)
        with st.expander(
            f"{entry.prompt.strip().splitlines()[0][:60]}  ({label}, {entry.tokens} tokens, "
            f"temperature {entry.temperature:g}, seed {entry.seed})",
            expanded=position == 0,
        ):
            left, right = st.columns(2)
            left.caption("Original")
            left.code(entry.dense_text, language=None, wrap_lines=True)
            right.caption(f"Compressed, {label}")
            right.code(entry.compressed_text, language=None, wrap_lines=True)

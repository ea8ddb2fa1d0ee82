"""Measurements on the Compare page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from lowrank_core.studio.compare.comparison import Comparison, warnings_of
from lowrank_core.studio.compare.comparison_chart import difference_chart
from lowrank_core.studio.compare.loss_details import lost_spec, saved_spec
from lowrank_core.studio.shared.formatting import count, interval_words, number, percent, sizes
from lowrank_core.studio.shared.summary import protocol_of
from pages.components import charts, tables
from pages.components.widgets import choose

__all__ = ["headline", "show_all", "show_refusals", "show_unspent"]

_WIDTHS = [1.05, 1.25, 0.95, 1.25, 1.15]  # of the cards: the longest labels fit at 1280 pixels
_TABLES = {"lost": "Quality", "saved": "Size"}


def show_all(result: Sequence[Comparison]) -> None:
    """Draw all measurements of this run next to the dense model."""
    for warning in warnings_of(result):
        st.warning(warning, icon=":material/warning:")
    charts.show(difference_chart(result, protocol_of(result[0])), key="perplexity_differences")
    _table(result)
    st.caption(f"Protocol: {protocol_of(result[0])}. Intervals are of 95 %, bootstrap over windows.")


def show_unspent(notes: Sequence[str]) -> None:
    """Warn of models whose rounded ranks leave part of the budget: they are smaller than the others."""
    for note in notes:
        st.caption(f":material/warning: {note}")


def show_refusals(reasons: Mapping[str, str]) -> None:
    """List the presets that failed, with reasons."""
    for name, reason in reasons.items():
        st.caption(f":material/block: **{name}** was not measured: {reason}")


def headline(shown: Comparison) -> None:
    """Draw one model's quality and size as metric cards."""
    change = shown.perplexity - shown.dense_perplexity
    cards = (
        ("Perplexity, dense", number(shown.dense_perplexity, 4), interval_words(shown.dense_perplexity_interval), None),
        ("Perplexity, compressed", number(shown.perplexity, 4), interval_words(shown.perplexity_interval), None),
        (
            "Difference",
            f"{change:+z.3g}",
            interval_words(shown.perplexity_difference_interval),
            "Compressed minus dense, paired by window.",
        ),
        ("KL to the dense model", number(shown.kl), "nats per token", None),
        ("Top-1 agreement", percent(shown.top1_agreement), "of tokens", "Where both models rank the same token first."),
    )
    _row(cards, _WIDTHS)
    _sizes(shown)


def _row(cards: Sequence[tuple[str, str, str, str | None]], widths: Sequence[float]) -> None:
    """Draw cards side by side: label, value, what stands below, help."""
    for column, card in zip(st.columns(widths, gap="small"), cards, strict=True):  # type: ignore[arg-type]
        with column:
            _card(*card)


def _card(label: str, value: str, below: str, meaning: str | None) -> None:
    with st.container(border=True, gap="xxsmall"):
        st.metric(label, value, help=meaning)
        st.caption(below)


def _sizes(shown: Comparison) -> None:
    linears = f"{count(shown.dense_compressible_parameters)} → {count(shown.compressible_parameters)}"
    model = f"{count(shown.dense_parameters)} → {count(shown.parameters)}"
    stored = " → ".join(sizes((shown.dense_bytes, shown.bytes)))
    cards = (
        ("Compressible linears, parameters", linears, f"{percent(shown.compression_ratio)} removed", None),
        ("Whole model, parameters", model, f"{percent(shown.model_compression_ratio)} removed", None),
        ("Whole model, bytes", stored, f"{percent(1 - shown.bytes / shown.dense_bytes)} removed", None),
    )
    _row(cards, [1, 1, 1])


def _table(result: Sequence[Comparison]) -> None:
    shown = choose("Table", _TABLES, key="comparison_columns", label_visibility="collapsed")
    spec = lost_spec(result, protocol_of(result[0])) if shown == "lost" else saved_spec(result)
    tables.show(spec, key=f"comparison_table_{shown}")

"""One measured model in detail: window by window, and by position in the context."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.compare.loss_details import position_table, window_table
from lowrank_core.studio.compare.loss_details_chart import histogram_figure, position_figure, scatter_figure
from lowrank_core.studio.shared.summary import protocol_of
from pages.components.charts import chart
from pages.components.compare.measured import headline

__all__ = ["one_model", "positions", "windows"]

_OLD = "was measured before this was recorded. Measure it again in a run of your own."


def one_model(result: Sequence[Comparison], wanted: str) -> Comparison:
    """Draw the choice of a measured model and its figures; ``wanted`` is the key of the one that is shown first."""
    known = {comparison.key: comparison for comparison in result}
    first = list(known).index(wanted) if wanted in known else 0
    key = st.selectbox(
        "Original against", list(known), first, key=f"one_model_{wanted}", format_func=lambda key: known[key].name, width=420
    )
    shown = known.get(key, result[0])
    headline(shown)
    return shown


def windows(shown: Comparison) -> None:
    """Draw the loss of both models on each window, and how the differences are spread."""
    view = window_table(shown)
    if view is None:
        st.info(f"{shown.name} {_OLD}", icon=":material/info:")
        return
    st.caption(f"{view.words} {protocol_of(shown)}.")
    left, right = st.columns(2, gap="medium")
    with left:
        chart(
            scatter_figure(view),
            key="window_scatter",
            title="Each window: original against compressed",
            how="above the diagonal the compressed model predicts worse (orange), below it better (blue).",
            alt=f"Loss of {shown.name} over that of the dense model, a dot for each test window",
            data=view.frame,
        )
    with right:
        chart(
            histogram_figure(view),
            key="window_histogram",
            title="How the differences are spread",
            how="a narrow heap next to zero is a small loss everywhere; a long tail is text that the compression broke.",
            alt=f"Histogram of the loss of {shown.name} less that of the dense model over test windows",
            data=view.frame[["window", "difference"]],
        )


def positions(shown: Comparison) -> None:
    """Draw what is lost after how many tokens of context."""
    table = position_table(shown)
    if table.empty:
        st.info(f"{shown.name} {_OLD}", icon=":material/info:")
        return
    chart(
        position_figure(table),
        key="positions",
        title="What is lost, by the tokens of context",
        how="a line that rises says that the compressed model makes less of a long context; the first tokens are few, so noisy.",
        alt=f"KL divergence and extra loss of {shown.name} by position in the context",
        data=table,
    )
    st.caption(f"{protocol_of(shown)}.")

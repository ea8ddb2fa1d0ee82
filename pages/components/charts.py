"""Charts on a page, with title, reading aid and data."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from lowrank_core.studio.shared.chart_style import CONFIG, Chart, legible
from lowrank_core.studio.shared.vega import PICKED, ZOOM, VegaChart
from pages.components.widgets import offer

__all__ = ["chart", "show"]


def chart(
    figure: go.Figure | VegaChart,
    *,
    key: str,
    title: str,
    how: str,
    alt: str,
    data: pd.DataFrame,
    on_pick: Callable[[], None] | None = None,
) -> None:
    """Show ``figure`` with its title, a sentence on how to read it, and its data as a file.

    Args:
        how: what a reader should look for.
        alt: for screen readers, what the picture shows.
        data: the table that the figure was drawn from.
        on_pick: called after a point was picked.
    """
    with st.container(horizontal=True, vertical_alignment="top", gap="small"):
        with st.container(gap="xxsmall"):
            st.markdown(f"**{title}**")
            st.caption(f"How to read this: {how}")
        _numbers(data, key)
    if isinstance(figure, VegaChart):
        picking = {"on_select": on_pick, "selection_mode": [PICKED, ZOOM]} if on_pick is not None else {}
        st.vega_lite_chart(figure.data, figure.spec, key=key, alt=alt, **picking)  # type: ignore[call-overload]
    elif on_pick is None:
        st.plotly_chart(legible(figure), key=key, config=CONFIG, alt=alt)
    else:
        st.plotly_chart(legible(figure), key=key, config=CONFIG, alt=alt, on_select=on_pick, selection_mode="points")


def show(spec: Chart, *, key: str, hint: str = "", on_pick: Callable[[], None] | None = None) -> None:
    """Show a chart that a report has, too; ``hint`` says what a click does."""
    how = f"{spec.how} {hint}".strip()
    chart(spec.figure, key=key, title=spec.title, how=how, alt=spec.alt, data=spec.data, on_pick=on_pick)


def _numbers(data: pd.DataFrame, key: str) -> None:
    """Offer ``data`` as a file."""
    offer("CSV", f"{key}.csv", data, key=f"{key}_csv", help="The data of this chart.", type="tertiary")

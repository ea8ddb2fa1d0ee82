"""One measured model by window and by position."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.studio.compare.comparison import Comparison
from lowrank_core.studio.compare.loss_details import window_table
from lowrank_core.studio.compare.loss_details_chart import position_chart, window_charts
from lowrank_core.studio.shared.summary import protocol_of
from pages.components import charts
from pages.components.compare.measured import headline
from pages.components.widgets import pick

__all__ = ["one_model", "positions", "windows"]

_OLD = "was measured before this was recorded. Measure it again in a run of your own."


def one_model(result: Sequence[Comparison], wanted: str) -> Comparison:
    """Draw the choice of a measured model and its charts; ``wanted`` is the key of the default."""
    known = {comparison.key: comparison for comparison in result}
    key = pick("Dense against", {key: known[key].name for key in known}, wanted, key=f"one_model_{wanted}", width=420)
    shown = known.get(key, result[0])
    headline(shown)
    return shown


def windows(shown: Comparison) -> None:
    """Draw the loss of both models by window, and the histogram of differences."""
    view, drawn = window_table(shown), window_charts(shown)
    if view is None or drawn is None:
        st.info(f"{shown.name} {_OLD}", icon=":material/info:")
        return
    st.caption(f"{view.words} {protocol_of(shown)}.")
    for column, spec, key in zip(st.columns(2, gap="medium"), drawn, ("window_scatter", "window_histogram"), strict=True):
        with column:
            charts.show(spec, key=key)


def positions(shown: Comparison) -> None:
    """Draw the loss by tokens of context."""
    spec = position_chart(shown)
    if spec is None:
        st.info(f"{shown.name} {_OLD}", icon=":material/info:")
        return
    charts.show(spec, key="positions")
    st.caption(spec.protocol)

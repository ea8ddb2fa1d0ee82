"""The table of pages, in the order of the story."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage

__all__ = ["COMPARE", "ENERGY", "OVERVIEW", "SEARCH", "SPECTRA", "pages"]

OVERVIEW, SPECTRA, ENERGY, SEARCH, COMPARE = (f"pages/{name}.py" for name in ("overview", "spectra", "energy", "search", "compare"))


def pages() -> list[StreamlitPage]:
    """Return the routes."""
    return [
        st.Page(OVERVIEW, title="Overview", icon=":material/home:", default=True),
        st.Page(SPECTRA, title="Spectra", icon=":material/grid_view:", url_path="spectra"),
        st.Page(ENERGY, title="Feature energy", icon=":material/area_chart:", url_path="energy"),
        st.Page(SEARCH, title="Rank search", icon=":material/query_stats:", url_path="search"),
        st.Page(COMPARE, title="Compare", icon=":material/balance:", url_path="compare"),
    ]

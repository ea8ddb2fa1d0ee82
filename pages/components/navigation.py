"""Table of pages, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage

__all__ = ["COMPARE", "ENERGY", "EXPORT", "MANUAL", "OVERVIEW", "SEARCH", "SENSITIVITY", "SPECTRA", "pages", "tab_title"]

OVERVIEW, SPECTRA, ENERGY, SENSITIVITY, MANUAL, SEARCH, COMPARE, EXPORT = (
    f"pages/{name}.py" for name in ("overview", "spectra", "energy", "sensitivity", "manual", "search", "compare", "export")
)


def pages() -> list[StreamlitPage]:
    """Return the routes.

    The icons stand in the titles: Streamlit would take a page's ``icon`` as the favicon, and have the browser fetch it from the internet.
    """
    return [
        st.Page(OVERVIEW, title=":material/home: Overview", default=True),
        st.Page(SPECTRA, title=":material/grid_view: Spectra", url_path="spectra"),
        st.Page(ENERGY, title=":material/area_chart: Feature energy", url_path="energy"),
        st.Page(SENSITIVITY, title=":material/equalizer: Sensitivity", url_path="sensitivity"),
        st.Page(MANUAL, title=":material/tune: Manual allocation", url_path="manual"),
        st.Page(SEARCH, title=":material/query_stats: Rank search", url_path="search"),
        st.Page(COMPARE, title=":material/balance: Compare", url_path="compare"),
        st.Page(EXPORT, title=":material/save: Export", url_path="export"),
    ]


def tab_title(page: StreamlitPage) -> str:
    """Return the title of the browser tab: without the icon."""
    return f"{page.title.partition(': ')[2]} · low-rank studio"

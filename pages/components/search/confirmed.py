"""Best trials of a search on test text."""

from __future__ import annotations

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare.comparison import confirmed, confirmed_spec
from pages.components import navigation, tables

__all__ = ["show"]


def show(run: Run) -> None:
    """Draw the test results; nothing without any.

    Raises:
        RunError: an answer, or the journal, is damaged.
    """
    result = confirmed(results(run), read_trials(run))
    if result is None:
        return
    st.subheader("Confirmed on test text", anchor=False)
    for warning in result.warnings:
        st.warning(warning, icon=":material/warning:")
    st.caption(
        f"No trial used this text: the search minimised on search-validation text. Protocol: {result.protocol}. Intervals are of 95 %, "
        "over windows."
    )
    tables.show(confirmed_spec(result), key="confirmed_table")
    st.page_link(navigation.COMPARE, label="More on the Compare page", icon=":material/balance:")

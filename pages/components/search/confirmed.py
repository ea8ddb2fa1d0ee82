"""The best trials of a search, measured on text that none of them saw."""

from __future__ import annotations

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.records import read_trials
from lowrank_core.studio.compare.comparison import confirmed
from pages.components import navigation, tables

__all__ = ["show"]


def show(run: Run) -> None:
    """Draw what was measured on test text; nothing before that.

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
        "No trial saw this text: the search went by search-validation text, so these figures are not the ones that were minimised. "
        f"Protocol: {result.protocol}. Intervals are of 95 %, over windows."
    )
    columns = {
        "name": tables.text("Allocation"),
        "value": tables.figure("Value (validation)", "The objective on search-validation text, as the search saw it."),
        "perplexity": tables.number("Perplexity (test)", 3),
        "low": tables.number("from", 3, "Lower end of the 95 % interval."),
        "high": tables.number("to", 3, "Upper end of the 95 % interval."),
        "kl": tables.figure("KL (test)", "Nats per token, to the dense model."),
        "kl_low": tables.figure("from", "Lower end of the 95 % interval."),
        "kl_high": tables.figure("to", "Upper end of the 95 % interval."),
    }
    tables.table(result.frame, columns, key="confirmed_table", alt="The best trials on test text")
    st.page_link(navigation.COMPARE, label="More on the Compare page", icon=":material/balance:")

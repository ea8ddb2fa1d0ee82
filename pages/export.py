"""Export: what is taken away, and is it what was measured?"""

from __future__ import annotations

import streamlit as st

from lowrank_core.views.runs import is_busy
from pages.components import asking, downloads, layout, navigation, state, takeaway, written
from pages.components.boundary import boundary, live

layout.header("Export", "What do you take away, and is it what was measured?")

with boundary():
    run = state.run()
    with boundary():
        layout.page_run()
    if run is None:
        text = "A model to take away needs an allocation. Start a search; its baselines are there within a minute."
        layout.empty("Nothing to export yet", text, icon=":material/save:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    live(asking.waiting, 1.0 if is_busy(run) else None, run)

    source = None
    with boundary():
        source = takeaway.show(run)

    st.subheader("Written models", anchor=False)
    with boundary():
        written.show(run)

    st.subheader("Downloads", anchor=False)
    with boundary():
        downloads.show(run, source)

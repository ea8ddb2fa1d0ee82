"""Export: write a compressed model and verify it."""

from __future__ import annotations

import streamlit as st

from lowrank_core.studio.shared.run_list import is_busy
from pages.components import layout, navigation, request_controls, state
from pages.components.boundary import boundary, live
from pages.components.export import export_form, export_list
from pages.components.overview import downloads

layout.header("Export", "Write a compressed model and verify that it is what was measured.")

with boundary():
    run = state.run()
    with boundary():
        layout.page_run()
    if run is None:
        text = "An export needs an allocation. Start a search; its baselines are measured within a minute."
        layout.empty("Nothing to export yet", text, icon=":material/save:", page=navigation.SEARCH, label="Start a search")
        st.stop()
    live(request_controls.waiting, 1.0 if is_busy(run) else None, run)

    source = None
    with boundary():
        source = export_form.show(run)

    st.subheader("Written models", anchor=False)
    with boundary():
        export_list.show(run)

    st.subheader("Downloads", anchor=False)
    with boundary():
        downloads.show(run, source)

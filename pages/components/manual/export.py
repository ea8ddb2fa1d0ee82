"""Export of a draft: the file and the commands that use it."""

from __future__ import annotations

import streamlit as st

from lowrank_core.allocation import Draft
from lowrank_core.studies.records import MANUAL
from lowrank_core.studio.shared.reproduce import compress_command, enqueue_command
from pages.components.manual.draft_state import DraftState
from pages.components.widgets import offer

__all__ = ["show"]


def show(editor: DraftState, draft: Draft) -> None:
    """Draw the download and the commands that use it."""
    name = f"{editor.run.id}-manual.json"
    st.subheader("Export", anchor=False)
    meaning = "Ranks and locks, for importing here, editing, or `lowrank compress --ranks`."
    offer("Allocation (JSON)", name, draft.to_json(MANUAL), key="hand_download", help=meaning)
    st.caption("Compress with it, by this run's recipe:")
    st.code(compress_command(editor.run.config, name, f"{editor.run.id}-manual"), language="bash", wrap_lines=True)
    if not editor.run.recorded:
        st.caption("Or queue it from a terminal, in the folder of the file:")
        st.code(enqueue_command(str(editor.run.path), name), language="bash", wrap_lines=True)

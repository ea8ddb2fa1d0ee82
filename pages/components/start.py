"""Start of a run from a page."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config import RunConfig
from lowrank_core.runs import client, create_run
from pages.components import state

__all__ = ["start"]


def start(config: RunConfig) -> None:
    """Create a run, start its worker, select it and redraw the page.

    Raises:
        RunError: the run directory can't be written or the worker not started.
    """
    run = create_run(config)
    client.start_worker(run)
    state.choose(run=run.id)
    st.rerun()

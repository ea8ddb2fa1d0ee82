"""Tokens along the top directions of the current module: request and result."""

from __future__ import annotations

import streamlit as st

from lowrank_core.config.directions import DirectionsConfig
from lowrank_core.runs import Run
from lowrank_core.runs.client import results
from lowrank_core.studies.requests import DirectionsRequest
from lowrank_core.studio.shared.run_list import is_busy
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.spectra.top_directions import direction_facts, direction_failure
from pages.components import request_controls, tables
from pages.components.boundary import live
from pages.components.widgets import choose, draw, pressed

__all__ = ["show"]

_SIDES = {"input": "Input", "output": "Output (features)"}
_RECORDED = "A recorded run has no worker and no text to show tokens from: start a calibration of your own on the Overview."


def show(run: Run, module: str) -> None:
    """Draw the form, the queue, and the newest result for the module."""
    st.subheader("Top directions", anchor=False)
    st.caption(
        "The directions along which this module's input, or output, varies most (eigenvectors of the pooled covariance), each with its "
        "most extreme tokens. The sign is arbitrary; the strongest token is positive."
    )
    side = _form(run, module)
    if not run.recorded:
        live(request_controls.waiting, 1.0 if is_busy(run) else None, run)
    bodies = results(run)
    failure = direction_failure(bodies, module, side)
    if failure is not None:
        st.error(f"The directions could not be read: {failure}", icon=":material/error:")
    result = direction_facts(bodies, module, side)
    if result is None:
        st.caption(_RECORDED if run.recorded else f"Not read yet for the {side} of `{module}`.")
        return
    columns = (
        Column.whole("direction", "Direction", "The largest eigenvalue first."),
        Column.share("share", "Energy", "The direction's eigenvalue over the sum of all."),
        Column.text("token", "Token", "␣ is a space, ↵ a new line."),
        Column.text("context", "Context", "The token stands between ⟦ and ⟧.", width="large"),
        Column.number("projection", "Projection (SD)", 1, "In standard deviations along the direction, over the calibration text."),
    )
    tables.show(Table(result.frame, columns, f"Tokens along the top directions of {module}"), key="directions_table", height=380)
    st.caption(f"{result.protocol}. Each token is shown once per direction, at its most extreme position.")


def _form(run: Run, module: str) -> str:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        side = choose("Of its", _SIDES, key="direction_side")
        count = draw(DirectionsConfig, "directions", key="direction_count", width=130)
        windows = draw(DirectionsConfig, "windows", key="direction_windows", width=130)
        find = pressed("Show tokens", key="find_directions", icon=":material/explore:", why_not=request_controls.why_not(run, _RECORDED))
    if find:
        request_controls.ask(run, [DirectionsRequest(DirectionsConfig(module, side, directions=count, windows=windows))])
    return side

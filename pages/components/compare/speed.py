"""Measured speed and memory on the Compare page."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.config.speed import SpeedConfig
from lowrank_core.runs import Run
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.requests import SpeedRequest
from lowrank_core.studio.compare.comparison_chart import speedup_chart
from lowrank_core.studio.compare.measured_speed import Speed, speed_spec
from pages.components import charts, tables
from pages.components.request_controls import ask, why_not
from pages.components.widgets import draw

__all__ = ["show"]

_SIZES = {"batch_size": "batch", "prompt_tokens": "prompt", "new_tokens": "new", "rounds": "rounds"}
"""Field -> end of its widget's key."""


def show(run: Run, chosen: Sequence[ModelKey], result: Sequence[Speed]) -> None:
    """Draw the form and the timings."""
    _form(run, chosen)
    if not result:
        st.caption("Each model is timed in alternation with the dense model, warm. Fewer parameters are not always faster.")
        return
    charts.show(speedup_chart(result), key="speedups")
    for index, speed in enumerate(result):
        st.markdown(f"**{speed.name}**" + (f", {speed.setup}" if speed.setup else ""))
        tables.show(speed_spec(speed), key=f"speed_table_{index}")
        st.caption(f"Protocol: {speed.protocol}." + (f" Memory: {speed.memory}." if speed.memory else " Memory was not measured."))


def _form(run: Run, chosen: Sequence[ModelKey]) -> None:
    with st.form("speed_form"), st.container(horizontal=True, vertical_alignment="bottom"):
        sizes = {name: draw(SpeedConfig, name, key=f"speed_{key}", width=140) for name, key in _SIZES.items()}
        memory = st.checkbox("Peak memory", True, key="speed_memory", help="In a fresh process for each model, which takes longer.")
        start = st.form_submit_button(
            "Time the chosen models", key="time_models", icon=":material/speed:", disabled=run.recorded, help=why_not(run)
        )
    if start and not chosen:
        st.warning("No model is chosen above.")
    elif start:
        ask(run, (SpeedRequest(key, memory, SpeedConfig(**sizes)) for key in chosen))

"""Healing on the Compare page: form, live curve, result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from lowrank_core.config.healing import HealingConfig
from lowrank_core.config.options import options_of
from lowrank_core.runs import Run
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.requests import HealRequest
from lowrank_core.studio.compare.healing_chart import healing_chart
from lowrank_core.studio.compare.healing_runs import healings
from pages.components import charts
from pages.components.request_controls import ask, why_not
from pages.components.widgets import draw, draw_all, pick

__all__ = ["form", "show"]

_FIRST = {"method": 300, "steps": 150, "cross_entropy": 210}
"""Options outside of Advanced, with their widths."""


def form(run: Run, result: Mapping[ModelKey, str], first: ModelKey) -> None:
    """Draw the choice of an allocation, the settings and the start button."""
    trial = pick("Allocation to heal", result, first, key=f"heal_trial_{run.id}_{first}", width=380)
    with st.form("heal_form"):
        settings = _settings()
        pressed = st.form_submit_button("Start", key="heal", icon=":material/healing:", disabled=run.recorded, help=why_not(run))
    if pressed:
        ask(run, (HealRequest(key, HealingConfig(**settings)) for key in [trial]))


def _settings() -> dict[str, Any]:
    """Draw all healing options, the usual three first; return field -> value."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = {name: draw(HealingConfig, name, key=f"heal_{name}", width=width) for name, width in _FIRST.items()}
    with st.expander("Advanced"):
        others = [declared.name for declared in options_of(HealingConfig) if declared.name not in _FIRST]
        return chosen | draw_all(HealingConfig, others, st.columns(3), "heal_")


def show(run: Run) -> None:
    """Draw the newest healing; list older ones in a line each."""
    result = healings(run)
    if not result:
        st.caption("Trains the factors for some minutes on calibration text, selects a step on validation text, and measures on test text.")
        return
    if result[0].history:
        charts.show(healing_chart(result[0]), key="healing_curve")
    for healing in result:
        st.caption(healing.words)

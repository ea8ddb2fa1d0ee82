"""Repetition, endings and length over many continuations."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.config.evaluation import BehaviourConfig
from lowrank_core.runs import Run
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.requests import BehaviourRequest
from lowrank_core.studio.compare.behaviour import BEHAVIOUR_MEANING
from lowrank_core.studio.shared.table import Table
from pages.components import tables
from pages.components.request_controls import ask, why_not
from pages.components.widgets import draw

__all__ = ["show"]

_SIZES = ("prompts", "prompt_tokens", "new_tokens")


def show(run: Run, chosen: Sequence[ModelKey], result: Sequence[Table]) -> None:
    """Draw the form and a table for each protocol."""
    st.markdown("**Behaviour over many prompts**", help=BEHAVIOUR_MEANING)
    _form(run, chosen)
    for table in result:
        tables.show(table, key=table.file)
        st.caption(table.caption)


def _form(run: Run, chosen: Sequence[ModelKey]) -> None:
    with st.form("behaviour_form"), st.container(horizontal=True, vertical_alignment="bottom"):
        sizes = {name: draw(BehaviourConfig, name, key=f"behaviour_{name}", width=160) for name in _SIZES}
        start = st.form_submit_button(
            "Measure behaviour", key="measure_behaviour", icon=":material/repeat:", disabled=run.recorded, help=why_not(run)
        )
    if start and not chosen:
        st.warning("No model is chosen above.")
    elif start:
        ask(run, (BehaviourRequest(key, BehaviourConfig(**sizes)) for key in chosen))

"""The same prompt, continued by the dense model and by compressed models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from lowrank_core.config.evaluation import Sampling
from lowrank_core.runs import Run
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.requests import GenerateRequest
from lowrank_core.studio.compare.continuations import Prompt
from pages.components.request_controls import ask, why_not
from pages.components.widgets import draw

__all__ = ["show"]

_PROMPT = "def mean(values):\n    "
_SAMPLING: Mapping[str, dict[str, Any]] = {
    "tokens": {"label": "New tokens, at most", "max_value": 512, "width": 180},
    "temperature": {"usual": 0.5, "min_value": 0.0, "max_value": 2.0, "step": 0.1, "width": 160},
    "seed": {"min_value": 0, "width": 140},
}
"""Field -> what its widget has otherwise than the option declares."""


def show(run: Run, chosen: Sequence[ModelKey], result: Sequence[Prompt]) -> None:
    """Draw the form and the continued prompts, the newest open."""
    _form(run, chosen)
    for position, entry in enumerate(result):
        with st.expander(entry.title, expanded=position == 0):
            left, right = st.columns(2)
            left.caption(entry.label("Dense"))
            left.code(entry.original, language=None, wrap_lines=True)
            for name, text in entry.texts:
                right.caption(f"Compressed, {entry.label(name)}")
                right.code(text, language=None, wrap_lines=True)


def _form(run: Run, chosen: Sequence[ModelKey]) -> None:
    with st.form("prompt_form"):
        prompt = st.text_area("Prompt", _PROMPT, key="prompt", height=110)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            sampling = {name: draw(Sampling, name, key=f"prompt_{name}", **about) for name, about in _SAMPLING.items()}
            pressed = st.form_submit_button(
                "Continue with all chosen", key="continue", icon=":material/edit_note:", disabled=run.recorded, help=why_not(run)
            )
    if pressed and not prompt.strip():
        st.warning("The prompt is empty: write something to continue.")
    elif pressed and not chosen:
        st.warning("No model is chosen above.")
    elif pressed:
        ask(run, (GenerateRequest(key, prompt, Sampling(**sampling)) for key in chosen))

"""The same prompt, continued by the dense model and by compressed models."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.runs.client import TEMPERATURE
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studio.compare.continuations import Prompt
from pages.components.request_controls import submit, why_not

__all__ = ["show"]

_PROMPT = "def mean(values):\n    "


def show(run: Run, chosen: Sequence[ModelKey], result: Sequence[Prompt]) -> None:
    """Draw the form and the continued prompts, the newest open."""
    _form(run, chosen)
    for position, entry in enumerate(result):
        with st.expander(entry.title, expanded=position == 0):
            left, right = st.columns(2)
            left.caption("Dense")
            left.code(entry.original, language=None, wrap_lines=True)
            for name, text in entry.texts:
                right.caption(f"Compressed, {name}")
                right.code(text, language=None, wrap_lines=True)


def _form(run: Run, chosen: Sequence[ModelKey]) -> None:
    with st.form("prompt_form"):
        prompt = st.text_area("Prompt", _PROMPT, key="prompt", height=110)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            tokens = st.number_input("New tokens, at most", 1, 512, 64, key="prompt_tokens", width=180)
            temperature = st.number_input(
                "Temperature", 0.0, 2.0, TEMPERATURE, 0.1, key="prompt_temperature", width=160, help="0 always takes the likeliest token."
            )
            seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="prompt_seed", width=140, help="Used for all models.")
            pressed = st.form_submit_button(
                "Continue with all chosen", key="continue", icon=":material/edit_note:", disabled=run.recorded, help=why_not(run)
            )
    if pressed and not prompt.strip():
        st.warning("The prompt is empty: write something to continue.")
    elif pressed and not chosen:
        st.warning("No model is chosen above.")
    elif pressed:
        submit(run, "generate", chosen, prompt=prompt, tokens=int(tokens), temperature=float(temperature), seed=int(seed))

"""Token-level losses on the Compare page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from lowrank_core.runs import Run
from lowrank_core.studies.model_ref import ModelKey
from lowrank_core.studies.requests import TokensRequest
from lowrank_core.studio.compare.loss_details import WindowTable
from lowrank_core.studio.compare.token_losses import TokenStrip, strip_html, worst_spec
from lowrank_core.studio.overview.text_facts import text_facts
from pages.components import tables
from pages.components.request_controls import ask, why_not
from pages.components.widgets import choose, offer, pick, pressed

__all__ = ["show"]

_SOURCES = {"window": "A test window", "text": "Own text"}
_TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


def show(run: Run, chosen: Mapping[ModelKey, str], result: Sequence[TokenStrip], windows: WindowTable | None) -> None:
    """Draw the form for a text, and the evaluated texts; ``windows`` gives the default window."""
    _form(run, chosen, windows)
    if not result:
        st.caption("Shows where in a text the compressed model predicts worse than the dense model.")
        return
    titles = {index: strip.title for index, strip in enumerate(result)}
    index = pick("Shown", titles, key=f"strip_{len(result)}") if len(result) > 1 else 0
    strip = result[index]
    st.caption(f"{strip.name}. {strip.words}")
    with st.container(border=True, height=360 if len(strip.frame) > 150 else "content", key="token_strip"):
        st.html(strip_html(strip))
    st.caption(f"Hover over a token for its values. Protocol: {strip.protocol}.")
    st.markdown("**Tokens with the largest extra loss**")
    tables.show(worst_spec(strip), key="worst_tokens")
    offer("All tokens (CSV)", "tokens.csv", strip.frame, key="tokens_csv", type="tertiary")


def _form(run: Run, chosen: Mapping[ModelKey, str], windows: WindowTable | None) -> None:
    if not chosen:
        st.caption("Choose a model above.")
        return
    facts = text_facts(run)
    last = next((split.windows for split in facts.splits if split.name == "test"), 1) - 1 if facts else 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        subject = pick("Model", chosen, key="token_model", width=380)
        source = choose("Text", _SOURCES, key="token_source")
        if source == "window":
            worst = windows.worst if windows is not None else 0
            window = st.number_input(
                "Window",
                0,
                max(0, last),
                min(worst, max(0, last)),
                key=f"token_window_{run.id}",
                width=140,
                help="Of the test text; the default is the window with the largest extra loss.",
            )
    text = st.text_area("Text", _TEXT, key="token_text", height=110, persist_state="session") if source == "text" else ""
    if pressed("Evaluate both models", key="read_tokens", icon=":material/format_color_text:", why_not=why_not(run)):
        if source == "window":
            ask(run, [TokensRequest(subject, window=int(window))])
        elif text.strip():
            ask(run, [TokensRequest(subject, text)])
        else:
            st.warning("The text is empty: write a sentence or more.")

"""Compressible share of a model: one statement for all pages."""

from __future__ import annotations

import streamlit as st

from lowrank_core.studio.shared.model_facts import ModelFacts

__all__ = ["show", "warn"]

_FROM_HEADERS = "By names and shapes in the headers; which layers are reached, or share a weight, is known once the model is loaded."


def show(facts: ModelFacts | None, ratio: float | None = None) -> None:
    """State the compressible share, and a ratio of the linears as a ratio of the whole model."""
    if facts is None:
        return
    meaning = "" if ratio is None else f"{facts.coverage.ratio_words(ratio)}. "
    caveat = "" if facts.fingerprint else f" {_FROM_HEADERS}"
    st.caption(f"{meaning}{facts.coverage.statement()}.{caveat}")


def warn(facts: ModelFacts | None, ratio: float | None = None) -> None:
    """Warn if the non-embedding parameters are mostly not compressible."""
    warning = None if facts is None else facts.coverage.warning(ratio)
    if warning is not None:
        st.warning(f"{warning[0].upper()}{warning[1:]}", icon=":material/pie_chart:")

"""Shared widgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from lowrank_core.parameters import MatrixShape
from pages.components import state

__all__ = ["module_picker", "own_file"]


def module_picker(shapes: Sequence[MatrixShape]) -> str:
    """Draw the module picker shared by all pages, with one for the expert where the module is a mixture's, and return the name."""
    known = {shape.name: shape for shape in shapes}
    module = state.module_of(list(known))
    experts = [shape.name for shape in shapes if shape.mixture and shape.mixture == known[module].mixture]
    firsts: dict[str, str] = {}  # of each mixture, or a module alone
    for shape in shapes:
        firsts.setdefault(shape.mixture or shape.name, shape.name)
    with st.container(horizontal=True, gap="medium"):
        key = state.control("module_picker", experts[0] if experts else module)
        st.selectbox(
            "Module",
            list(firsts.values()),
            key=key,
            format_func=lambda name: known[name].mixture or name,
            on_change=state.pick_from_widget("module", key),
            help="Or click a cell of the map on the Spectra page.",
        )
        if experts:
            key = state.control("expert_picker", module)
            st.selectbox(
                "Expert",
                experts,
                key=key,
                format_func=lambda name: str(known[name].expert),
                on_change=state.pick_from_widget("module", key),
                help="One matrix of one expert; all experts of the mixture are compared further down.",
                width=120,
            )
    return module


def own_file(key: str, help: str, **about: Any) -> str:
    """Draw the input of a file's path, and return it."""
    path: str = st.text_input("Path of the file", key=key, placeholder="/data/notes.txt", help=help, persist_state="session", **about)
    return path

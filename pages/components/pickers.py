"""Shared widgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from pages.components import state

__all__ = ["module_picker", "own_file"]


def module_picker(names: Sequence[str]) -> str:
    """Draw the module picker shared by all pages, and return the name."""
    module = state.module_of(names)
    key = state.control("module_picker", module)
    st.selectbox(
        "Module", names, key=key, on_change=state.pick_from_widget("module", key), help="Or click a cell of the map on the Spectra page."
    )
    return module


def own_file(key: str, help: str, **about: Any) -> str:
    """Draw the input of a file's path, and return it."""
    path: str = st.text_input("Path of the file", key=key, placeholder="/data/notes.txt", help=help, persist_state="session", **about)
    return path

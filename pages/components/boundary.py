"""Where errors that users meet become a message on the page instead of a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import streamlit as st

from lowrank_core.errors import LowRankError

__all__ = ["boundary", "live"]

Given = ParamSpec("Given")


@contextmanager
def boundary() -> Iterator[None]:
    """Show a ``LowRankError`` raised inside as a message; what follows the block goes on."""
    try:
        yield
    except LowRankError as error:
        st.error(str(error), icon=":material/error:")


def live(body: Callable[Given, None], seconds: float | None, *arguments: Given.args, **options: Given.kwargs) -> None:
    """Draw ``body(*arguments)`` now, and again every ``seconds`` by itself (None: only when the page is drawn)."""

    def guarded() -> None:
        with boundary():
            body(*arguments, **options)

    # Streamlit knows a fragment by its function: two on a page must not look alike.
    guarded.__qualname__ = f"live.{body.__module__}.{body.__qualname__}"
    st.fragment(guarded, run_every=seconds)()

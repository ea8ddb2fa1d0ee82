"""Error boundary: messages on the page instead of tracebacks."""

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
    """Show a ``LowRankError`` raised inside as a message; the page continues after the block."""
    try:
        yield
    except LowRankError as error:
        st.error(str(error), icon=":material/error:")


def live(body: Callable[Given, None], seconds: float | None, *arguments: Given.args, **options: Given.kwargs) -> None:
    """Draw ``body(*arguments)`` now and every ``seconds`` (None: only with the page)."""

    def guarded() -> None:
        with boundary():
            body(*arguments, **options)

    # Streamlit knows a fragment by its function: two on a page must not look alike.
    guarded.__qualname__ = f"live.{body.__module__}.{body.__qualname__}"
    st.fragment(guarded, run_every=seconds)()

"""The pages of the dashboard, from its own table: tests that go over them cover a new page by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import streamlit as st


@dataclass(frozen=True)
class Route:
    """A page: its title, the path of its address, and the stem of its script."""

    title: str
    path: str
    script: str


def routes() -> list[Route]:
    """Return all pages in the order of the navigation."""
    from pages.components import navigation

    def route(script: str, *, title: str, url_path: str = "", default: bool = False) -> Route:
        return Route(title.partition(": ")[2], f"/{url_path}", Path(script).stem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(st, "Page", route)  # which needs a running app
        return navigation.pages()  # type: ignore[return-value]


ROUTES = routes()
NAMES = [route.script for route in ROUTES]

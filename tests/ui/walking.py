"""Going over a page as a visitor would: every choice of its rows of buttons, everything that is drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.testing.v1.element_tree import Block, ButtonGroup, Element

CHARTS = ("plotly_chart", "vega_lite_chart")


class _Label(str):
    """What a button says, in place of the value behind it."""


def views(test: AppTest) -> Iterator[str]:
    """Bring the page into each state that a panel or one of its rows of buttons leads to; yield what was pressed, "" for the page as it
    opens."""
    yield ""
    for key in _panels(test):
        yield open_panel(test, key)
    rows = {row.key: [label for label, value in zip(row.options, range(len(row.options)), strict=True) if value] for row in _rows(test)}
    for key, labels in rows.items():
        for label in labels:
            yield from _pressed(test, key, label)


def _panels(test: AppTest) -> list[str]:
    """Return the keys of the panels that draw what is in them only once they are open."""
    return [panel.proto.id.split("-", 2)[2] for panel in test.expander if panel.proto.id]


def open_panel(test: AppTest, key: str) -> str:
    test.session_state[key] = True
    test.run()
    return key


def _rows(test: AppTest) -> list[ButtonGroup]:
    return [row for row in test.get("button_group") if row.key and row._is_single_select]


def _pressed(test: AppTest, key: str, label: str) -> Iterator[str]:
    row = next((row for row in _rows(test) if row.key == key), None)
    if row is None or row.proto.disabled:
        return  # another choice has taken it away
    plain = ButtonGroup.format_func.fget
    with pytest.MonkeyPatch.context() as patch:
        words = property(lambda row: lambda value: value if isinstance(value, _Label) else plain(row)(value))
        patch.setattr(ButtonGroup, "format_func", words)
        row.set_value(_Label(label)).run()
    yield label


def elements(test: AppTest) -> Iterator[Element]:
    """Yield every element of the page and its sidebar."""

    def below(block: Block) -> Iterator[Element]:
        for child in block.children.values():
            if isinstance(child, Block):
                yield from below(child)
            else:
                yield child

    yield from below(test.main)
    yield from below(test.sidebar)


def charts(test: AppTest) -> list[Element]:
    return [element for kind in CHARTS for element in test.get(kind)]

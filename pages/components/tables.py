"""Tables: columns in words, and picking a row."""

from __future__ import annotations

import re
from collections.abc import Callable

import pandas as pd
import streamlit as st

__all__ = ["ColumnConfig", "figure", "number", "share", "table", "text", "whole"]

ColumnConfig = dict[str, object]


def number(label: str, digits: int = 3, meaning: str | None = None) -> object:
    return st.column_config.NumberColumn(label, format=f"%.{digits}f", help=meaning)


def figure(label: str, meaning: str | None = None, width: int | None = None) -> object:
    """A number with four significant digits, however small."""
    return st.column_config.NumberColumn(label, format="%.4g", help=meaning, width=width)


def whole(label: str, meaning: str | None = None) -> object:
    return st.column_config.NumberColumn(label, format="localized", help=meaning)


def share(label: str, meaning: str | None = None) -> object:
    """A fraction in [0, 1], shown as percent."""
    return st.column_config.NumberColumn(label, format="percent", help=meaning)


def text(label: str, meaning: str | None = None, width: str | int | None = None) -> object:
    return st.column_config.TextColumn(label, help=meaning, width=width)  # type: ignore[arg-type]


def table(
    frame: pd.DataFrame,
    columns: ColumnConfig,
    *,
    key: str,
    height: int | str = "auto",
    on_pick: Callable[[], None] | None = None,
    several: bool = False,
    alt: str | None = None,
) -> None:
    """Show the ``columns`` of ``frame``, in their order; a missing value is a dash. ``several`` rows can be picked, or one."""
    frame = _without_negative_zeros(frame, columns)
    shown = [name for name in columns if name in frame.columns]
    picking = {"on_select": on_pick, "selection_mode": "multi-row" if several else "single-row"} if on_pick is not None else {}
    st.dataframe(
        frame, column_order=shown, column_config=columns, hide_index=True, height=height, key=key, placeholder="–", alt=alt, **picking
    )  # type: ignore[call-overload]


def _without_negative_zeros(frame: pd.DataFrame, columns: ColumnConfig) -> pd.DataFrame:
    """Return ``frame`` with 0 for what a column of so many decimals would show as -0.000."""
    shown = {name: digits for name, config in columns.items() if name in frame.columns and (digits := _decimals(config)) is not None}
    tiny = {
        name: frame[name].mask(pd.to_numeric(frame[name], errors="coerce").abs() < 0.5 * 10.0**-digits, 0.0)
        for name, digits in shown.items()
    }
    return frame.assign(**tiny) if tiny else frame


def _decimals(config: object) -> int | None:
    """Return the decimals of a column that ``number`` made."""
    kind = config.get("type_config") if isinstance(config, dict) else None
    result = re.fullmatch(r"%\.(\d+)f", str(kind.get("format"))) if isinstance(kind, dict) else None
    return int(result[1]) if result else None

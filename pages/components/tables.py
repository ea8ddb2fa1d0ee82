"""Tables on a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import streamlit as st

from lowrank_core.studio.shared.formatting import size_unit
from lowrank_core.studio.shared.table import Column, Table

__all__ = ["config", "in_one_unit", "show"]

_FORMATS = {"whole": "localized", "moment": "D MMM, HH:mm:ss", "ago": "distance", "share": "percent", "bytes": "%.4g"}
"""Streamlit's word for a kind, where it is not the same."""


def config(column: Column) -> object:
    """Return ``column`` in Streamlit's words."""
    said = {"label": column.label, "help": column.help or None, "width": column.width}
    if column.kind in ("text", "short"):
        return st.column_config.TextColumn(**said)  # type: ignore[arg-type]
    if column.kind == "flag":
        return st.column_config.CheckboxColumn(**said)  # type: ignore[arg-type]
    if column.kind in ("moment", "ago"):
        return st.column_config.DatetimeColumn(**said, format=_FORMATS[column.kind])  # type: ignore[arg-type]
    fixed = "%.4g" if column.decimals is None else f"%.{column.decimals}f"
    return st.column_config.NumberColumn(**said, format=fixed if column.kind == "number" else _FORMATS.get(column.kind, column.kind))  # type: ignore[arg-type]


def show(table: Table, *, key: str, height: int | str = "auto", on_pick: Callable[[], None] | None = None, several: bool = False) -> None:
    """Show ``table``; a missing value is a dash. ``several`` rows can be picked, or one."""
    picking = {"on_select": on_pick, "selection_mode": "multi-row" if several else "single-row"} if on_pick is not None else {}
    table = in_one_unit(table)
    st.dataframe(
        _without_negative_zeros(table),
        column_order=[column.name for column in table.shown],
        column_config={column.name: config(column) for column in table.shown},
        hide_index=True,
        height=height,
        key=key,
        placeholder="–",
        alt=table.caption,
        **picking,
    )  # type: ignore[call-overload]


def in_one_unit(table: Table) -> Table:
    """Return the table with all sizes in one binary unit, which the head names: Streamlit's own format has decimal ones."""
    columns = [column for column in table.shown if column.kind == "bytes"]
    if not columns:
        return table
    unit, suffix = size_unit(float(np.nanmax([table.frame[column.name].max() for column in columns])))
    frame = table.frame.assign(**{column.name: table.frame[column.name] / unit for column in columns})
    shown = [replace(column, label=f"{column.label} ({suffix})") if column.kind == "bytes" else column for column in table.shown]
    return replace(table, frame=frame, columns=shown)


def _without_negative_zeros(table: Table) -> pd.DataFrame:
    """Return the frame with 0 for what a column of so many decimals would show as -0.000."""
    tiny = {
        column.name: (values := table.frame[column.name]).mask(
            pd.to_numeric(values, errors="coerce").abs() < 0.5 * 10.0**-column.decimals, 0.0
        )
        for column in table.shown
        if column.decimals is not None
    }
    return table.frame.assign(**tiny) if tiny else table.frame

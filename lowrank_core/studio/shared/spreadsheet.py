"""CSV files safe for spreadsheet programs: no cell of foreign text becomes a formula."""

from __future__ import annotations

import pandas as pd

__all__ = ["csv_of"]

_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""First characters of formulas in spreadsheet programs; an apostrophe before makes text."""


def csv_of(frame: pd.DataFrame) -> str:
    """Return ``frame`` as CSV without its index; numbers stay numbers, also those that are written as text."""
    guarded = {name: [_guarded(cell) for cell in frame[name]] for name in frame.columns if _holds_text(frame[name])}
    safe = frame.assign(**{str(name): pd.Series(cells, index=frame.index, dtype=object) for name, cells in guarded.items()})
    text: str = safe.rename(columns={name: _guarded(name) for name in safe.columns}).to_csv(
        index=False, lineterminator="\r\n"
    )  # RFC 4180; with another, a return inside a cell is not quoted
    return text


def _holds_text(column: pd.Series) -> bool:
    return not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column))


def _guarded(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) and not _is_number(cell) else cell


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

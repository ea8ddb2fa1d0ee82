"""Numbers with fixed decimals, and intervals in words, for commands, model cards and pages alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "BINARY_UNITS",
    "NO_INTERVAL",
    "amount",
    "duration",
    "fixed",
    "fixed_interval",
    "fraction_words",
    "given_percent",
    "has_interval",
]

NO_INTERVAL = "no interval"
"""Shown for an interval of zero width: one window, or identical ones."""

BINARY_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
"""Bytes and symbol of the units of all sizes, the largest first."""


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """Return ``value`` with ``digits`` decimals; what rounds to zero is 0.0000, never -0.0000."""
    return f"{value:{'+' if signed else ''}z.{digits}f}"


def has_interval(ends: Sequence[float] | None) -> bool:
    """Return whether there are two finite ends that differ: older versions drew an interval of no width from one window."""
    return ends is not None and len(ends) == 2 and all(math.isfinite(end) for end in ends) and ends[0] != ends[1]


def fixed_interval(ends: Sequence[float] | None, digits: int, *, signed: bool = False) -> str:
    """Return the ends of an interval with ``digits`` decimals; words where there is none."""
    if ends is None or not has_interval(ends):
        return NO_INTERVAL
    return " to ".join(fixed(end, digits, signed=signed) for end in ends)


def fraction_words(value: float | None) -> str:
    """Return a measured fraction in percent; a dash without one."""
    return "–" if value is None else f"{value:.1%}"


def given_percent(fraction: float) -> str:
    """Return a fraction that somebody chose in percent, as it was given: 12.5%, not 12%."""
    return f"{100 * fraction:.6g}%"


def amount(size: int) -> str:
    """Return bytes in the binary unit that fits them: what is a few MiB is not 0.0 GiB."""
    for unit, suffix in BINARY_UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {suffix}"
    return f"{size} bytes"


def duration(seconds: float) -> str:
    """Return seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""Formatting of numbers. A missing or non-finite number is a dash, never ``nan``."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from datetime import datetime

from lowrank_core import wording
from lowrank_core.wording import BINARY_UNITS, NO_INTERVAL, fixed, has_interval

__all__ = [
    "DASH",
    "NO_INTERVAL",
    "age",
    "count",
    "duration",
    "fixed",
    "interval",
    "interval_words",
    "kind_label",
    "local_time",
    "number",
    "percent",
    "plain",
    "short_duration",
    "shortened",
    "size",
    "size_unit",
    "sizes",
    "timestamp",
]

DASH = "–"
_MARKS = re.compile(r"[\\`*_{}\[\]()#+\-.!|<>~$:&^=@/]")  # the signs that Markdown and Streamlit's own directives begin or end with
_COUNTS = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from, unit, suffix


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits; whole numbers in full up to ten million."""
    if value is None or _missing(value):
        return DASH
    if abs(value) >= 1e7:
        return f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e+", "e")
    if value == 0 or abs(value) >= 10**digits:
        return f"{value:z,.0f}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}" if decimals <= 6 else f"{value:.{digits - 1}e}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in [0, 1] as percent."""
    return DASH if value is None or _missing(value) else f"{fixed(100 * value, digits)} %"


def count(value: float | None) -> str:
    """Return a count, shortened from ten thousand on: 6.91 M."""
    if value is None or _missing(value):
        return DASH
    for minimum, unit, suffix in _COUNTS:
        if value >= minimum:
            return f"{number(value / unit)} {suffix}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Return bytes in binary units."""
    if value is None or _missing(value):
        return DASH
    unit, suffix = size_unit(value)
    return f"{number(value / unit)} {suffix}" if unit > 1 else f"{value:,.0f} {suffix}"


def size_unit(largest: float) -> tuple[int, str]:
    """Return the binary unit, in bytes, for sizes up to ``largest``, and its symbol."""
    return next((entry for entry in BINARY_UNITS if largest >= entry[0]), (1, "B"))


def sizes(bytes_of: Iterable[float | None]) -> list[str]:
    """Return bytes that are compared with each other in one unit, that of the largest; a dash for a missing one."""
    values = [math.nan if value is None else value for value in bytes_of]
    unit, suffix = size_unit(max((value for value in values if not _missing(value)), default=0))
    return [DASH if _missing(value) else f"{number(value / unit)} {suffix}" if unit > 1 else f"{value:,.0f} {suffix}" for value in values]


def duration(seconds: float | None) -> str:
    """Return seconds as ``42 s``, ``3 min 05 s`` or ``2 h 10 min``; a dash where there are none."""
    return DASH if seconds is None or _missing(seconds) else wording.duration(seconds)


def short_duration(seconds: float | None) -> str:
    """Return seconds as ``duration`` does, below ten with a decimal: ``0.92 s``."""
    return f"{number(seconds, 2)} s" if seconds is not None and 0 <= seconds < 10 else duration(seconds)


def shortened(text: str, maximum: int) -> str:
    """Return ``text`` in one line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= maximum else f"{line[: maximum - 1].rstrip()}…"


def plain(text: str) -> str:
    """Return ``text`` escaped for Markdown, so that foreign text adds no picture, link, colour or icon."""
    return _MARKS.sub(r"\\\g<0>", text)


def interval(low: float | None, high: float | None) -> str:
    """Return ``low to high``."""
    return DASH if low is None or high is None or _missing(low) or _missing(high) else f"{number(low)} to {number(high)}"


def interval_words(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return the ends of a measured interval with so many significant digits; words where there is none."""
    return " to ".join(number(end, digits) for end in ends) if ends is not None and has_interval(ends) else NO_INTERVAL


def timestamp(seconds: float) -> str:
    """Return local date and time: 14 Mar 09:05; of another year, with it: 14 Mar 2025."""
    moment = time.localtime(seconds)
    return f"{moment.tm_mday} {time.strftime('%b %H:%M' if moment.tm_year == time.localtime().tm_year else '%b %Y', moment)}"


def local_time(seconds: float) -> datetime:
    """Return local date and time for a table, which shows them as they are: the same as ``timestamp`` says next to it."""
    return datetime.fromtimestamp(seconds)


def age(seconds: float, now: float) -> str:
    """Return how long ago ``seconds`` was, roughly."""
    passed = max(0.0, now - seconds)
    for unit, word in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= unit:
            return f"{int(passed // unit)} {word} ago"
    return "just now"


def kind_label(kind: str) -> str:
    """Return a module type without the suffix: q_proj is q."""
    return kind.removesuffix("_proj")

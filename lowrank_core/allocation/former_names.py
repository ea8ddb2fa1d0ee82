"""Names that allocators had in earlier versions: studies, requests, results and healings on disk have them, and people type them."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["current_name", "with_current_names"]

_FORMER = {"marginal": "lagrangian"}
_NAME = re.compile(rf"({'|'.join(_FORMER)})(?=$|[ ,])")
_KEYS = ("label", "trial", "allocation", "complete")
"""Of a request, its arguments, or its result: where an allocator's name stands."""


def current_name(label: str) -> str:
    """Return ``label`` with today's name of the allocator that it begins with: also of ``marginal, healed by distill``."""
    return _NAME.sub(lambda match: _FORMER[match[1]], label, count=1) if _NAME.match(label) else label


def with_current_names(body: Mapping[str, object]) -> dict[str, object]:
    """Return a request, a result, or the record of a healing with today's names of allocators."""
    result = dict(body)
    for key, value in body.items():
        if key in _KEYS and isinstance(value, str):
            result[key] = current_name(value)
        elif key == "arguments" and isinstance(value, Mapping):
            result[key] = with_current_names(value)
    return result

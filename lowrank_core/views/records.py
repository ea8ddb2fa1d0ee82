"""Building frozen records from the JSON that a worker wrote."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from lowrank_core.errors import RunError

__all__ = ["build"]

T = TypeVar("T")


def build(kind: type[T], body: Mapping[str, Any], source: str, **given: object) -> T:
    """Return the dataclass ``kind`` from the keys of ``body`` that it knows; ``given`` values come first.

    Keys that ``kind`` does not know are left alone: a newer worker may write more.

    Raises:
        RunError: a key is missing or holds the wrong kind of value; the message names ``source`` and the key.
    """
    values: dict[str, object] = {}
    hints = typing.get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in given:
            values[field.name] = given[field.name]
        elif field.name in body:
            values[field.name] = _checked(body[field.name], hints[field.name], f"{source}: {field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RunError(f"{source} has no {field.name!r}: it was written by another version. Start the calibration again.")
    return kind(**values)


def _checked(value: object, hint: object, where: str) -> object:
    """Return ``value`` if it fits ``hint`` (lists become tuples, whole numbers become floats)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is tuple and isinstance(value, list):
            return tuple(value)
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if plain is object or (isinstance(plain, type) and isinstance(value, plain) and not (plain is int and isinstance(value, bool))):
            return value
    raise RunError(f"{where} holds {value!r}, which is not a value of that kind. Start the calibration again.")

"""Building frozen records from the JSON that a worker wrote."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
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
            values[field.name] = _checked(body[field.name], hints[field.name], source, field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RunError(f"{source} has no {field.name!r}: it was written by another version. Start what wrote it again.")
    return kind(**values)


def _checked(value: object, hint: object, source: str, name: str) -> object:
    """Return ``value`` if it fits ``hint`` (lists become tuples, their members records, and whole numbers become floats)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is tuple and isinstance(value, list):
            return _members(value, typing.get_args(option), source)
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if plain is object or (isinstance(plain, type) and isinstance(value, plain) and not (plain is int and isinstance(value, bool))):
            return value
    raise RunError(f"{source}: {name} holds {value!r}, which is not a value of that kind. Start what wrote it again.")


def _members(value: list[object], kinds: tuple[Any, ...], source: str) -> tuple[object, ...]:
    """Return a list as a tuple, each member as the record that ``tuple[Record, ...]`` names."""
    kind = kinds[0] if kinds else object
    return tuple(_member(entry, kind, source) for entry in value) if is_dataclass(kind) else tuple(value)


def _member(entry: object, kind: Any, source: str) -> object:
    if not isinstance(entry, Mapping):
        raise RunError(f"{source} of the worker is damaged. Ask again.")
    return build(kind, entry, source)

"""Frozen dataclasses as JSON, and back: strictly for what users wrote, leniently for what a worker wrote.

Names and values of earlier versions are understood (``options.renamed``).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from types import MappingProxyType
from typing import Any, TypeVar

from lowrank_core.config.options import hints_of, renamed
from lowrank_core.errors import ConfigError, LowRankError, RunError

__all__ = ["INLINE", "build", "from_mapping", "to_mapping"]

T = TypeVar("T")

INLINE = MappingProxyType({"inline": True})
"""Metadata of a field that is a dataclass itself, and whose keys stand among those around it; at most one in a class."""


def to_mapping(value: object) -> dict[str, object]:
    """Return a dataclass as a JSON-ready mapping."""
    result: dict[str, Any] = dataclasses.asdict(value)  # type: ignore[call-overload]
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        if "inline" in field.metadata:
            result |= result.pop(field.name)
    return result


def from_mapping(kind: type[T], mapping: Mapping[str, object]) -> T:
    """Return the dataclass ``kind`` from JSON, nested dataclasses included.

    Raises:
        ConfigError: an unknown or a missing key, or a value of the wrong type.
    """
    try:
        return _Decoder().built(kind, mapping)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def build(kind: type[T], body: Mapping[str, Any], source: str, advice: str = "Start what wrote it again.", **given: object) -> T:
    """Return the dataclass ``kind`` from the keys of ``body`` that it knows; ``given`` values come first.

    Keys that ``kind`` does not know are left alone: a newer worker may write more.

    Raises:
        RunError: a key is missing or holds the wrong kind of value; the message names ``source`` and the key, and ends with ``advice``.
    """
    return _Decoder(source, advice).built(kind, body, given)


@functools.cache
def _declared(kind: type) -> tuple[Mapping[str, dataclasses.Field[Any]], Mapping[str, Any], tuple[str, ...]]:
    """Return the fields and the types of ``kind`` by name, and the names of those that are inline; a file may have thousands of lines."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    return known, hints_of(kind), tuple(name for name, field in known.items() if "inline" in field.metadata)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """Lenient for a ``source`` that a worker wrote, strict without one."""

    source: str = ""
    advice: str = ""

    def built(self, kind: type[T], body: Mapping[str, object], given: Mapping[str, object] | None = None) -> T:
        if not isinstance(body, Mapping):
            raise self._error(f"{kind.__name__}: expected an object, got {type(body).__name__}.")
        known, hints, among = _declared(typing.cast(Any, kind))
        body, given = renamed(kind, body), given or {}
        rest = {name: value for name, value in body.items() if name not in known or name in among}
        if not self.source and not among and rest:
            raise ConfigError(f"{kind.__name__}: unknown {', '.join(sorted(rest))}; it knows {', '.join(known)}.")
        body |= dict.fromkeys(among, rest)
        values = dict(given)
        for field in known.values():
            if field.name in body and field.name not in given:
                values[field.name] = self._value(body[field.name], hints[field.name], field.name)
            elif field.name not in given and field.default is MISSING and field.default_factory is MISSING:
                raise self._error(f"{self.source or kind.__name__} has no {field.name!r}: it was written by another version.")
        return kind(**values)

    def _value(self, value: object, hint: object, name: str) -> object:
        """Return ``value`` if it fits ``hint``: lists become tuples, objects dataclasses, and whole numbers floats."""
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            plain = typing.get_origin(option) or option
            if dataclasses.is_dataclass(plain) and isinstance(plain, type) and (value is not None or len(options) == 1):
                return self.built(plain, value)  # type: ignore[arg-type]
            if plain is tuple and isinstance(value, list):
                return self._members(value, typing.get_args(option), name)
            if plain is float and type(value) is int:
                return float(value)
            if plain is object or (isinstance(plain, type) and isinstance(value, plain) and not (plain is int and isinstance(value, bool))):
                return value
        plain = (typing.get_origin(option) or option for option in options)
        wanted = " or ".join("list" if each is tuple else getattr(each, "__name__", str(each)) for each in plain)
        raise self._error(f"{self.source + ': ' if self.source else ''}{name}: expected {wanted}, got {value!r}.")

    def _members(self, value: list[object], kinds: tuple[Any, ...], name: str) -> tuple[object, ...]:
        kind = kinds[0] if kinds else object
        return tuple(self._value(entry, kind, name) for entry in value) if dataclasses.is_dataclass(kind) else tuple(value)

    def _error(self, message: str) -> LowRankError:
        return RunError(f"{message} {self.advice}") if self.source else ConfigError(message)

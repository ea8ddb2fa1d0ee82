"""Configs as JSON, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TypeVar

from lowrank_core.config.options import renamed
from lowrank_core.errors import ConfigError

__all__ = ["from_mapping", "to_mapping"]

T = TypeVar("T")


def to_mapping(value: object) -> dict[str, object]:
    """Return a dataclass as a JSON-ready mapping."""
    return dataclasses.asdict(value)  # type: ignore[call-overload, no-any-return]


def from_mapping(kind: type[T], mapping: Mapping[str, object]) -> T:
    """Build the dataclass ``kind`` from JSON, nested dataclasses included; names and values of earlier versions are understood.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{kind.__name__}: expected an object, got {type(mapping).__name__}.")
    mapping = renamed(kind, mapping)
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(mapping) - set(hints))
    if unknown:
        raise ConfigError(f"{kind.__name__}: unknown {', '.join(unknown)}; it knows {', '.join(hints)}.")
    try:
        return kind(**{name: _decode(hints[name], value) for name, value in mapping.items()})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def _decode(hint: object, value: object) -> object:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ConfigError(f"expected {hint.__name__}, got {value!r}.")
    return value

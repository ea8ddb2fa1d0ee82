"""Options: each is declared once, as a field of a config, and everything else is derived from its declaration. Torch-free.

Flags with their help (``cli.options``), widgets (``pages.components.widgets``), the command that repeats a run
(``studio.shared.reproduce``), the comparison of runs (``studio.overview.run_comparison``) and the tables of ``docs/options.md``
all read ``options_of(kind)``: a new option is one field.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from lowrank_core.errors import ConfigError

__all__ = ["Declared", "Option", "changed_options", "check_options", "hints_of", "option", "options_of", "renamed"]

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """Declaration of an option.

    Attributes:
        help: a sentence: for ``--help``, the (i) of a form, and the docs.
        label: on forms and in comparisons; the name of the field without underscores where empty.
        choices: values, or value -> label; empty where any value is one, or where a registry above this package has them.
        minimum, maximum: bounds, themselves allowed.
        step: of a form's number input.
        flag: without dashes; the name of the field where empty.
        unit: of the value, such as tokens.
        fallback: what stands in ``--help`` for the default, where that depends on something else.
        formerly: names of the field in earlier versions: files may have them, and their flags are taken.
        values_formerly: values of earlier versions -> today's.
    """

    help: str
    label: str = ""
    choices: Collection[str] = ()
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    flag: str = ""
    unit: str = ""
    fallback: str = ""
    formerly: tuple[str, ...] = ()
    values_formerly: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Declared:
    """An option as a config declares it: the field's name, type and default next to what it is."""

    name: str
    type: type
    optional: bool
    default: Any
    option: Option

    @property
    def label(self) -> str:
        return self.option.label or self.name.replace("_", " ").capitalize()

    @property
    def flag(self) -> str:
        """The flag with its dashes."""
        return f"--{self.option.flag or self.name.replace('_', '-')}"

    def words(self, value: object) -> str:
        """Return a value as a form or a table shows it."""
        choices = self.option.choices
        return str(choices[str(value)]) if isinstance(choices, Mapping) and value in choices else self.typed(value)

    def typed(self, value: object) -> str:
        """Return a value as it is typed, or yes and no for a switch."""
        if isinstance(value, tuple):
            return " ".join(map(self.typed, value)) or "–"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "–" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def option(default: Any, help: str, **about: Any) -> Any:
    """Return a dataclass field that is an option; ``about`` are further fields of ``Option``, and the default ``MISSING`` is none."""
    return field(default=default, metadata={_KEY: Option(help, **about)})


_HINTS: dict[type, dict[str, Any]] = {}
_DECLARED: dict[type, tuple[Declared, ...]] = {}
"""Looked up once for a class: every record that is read asks for them."""


def hints_of(kind: type) -> dict[str, Any]:
    """Return field -> type of a dataclass."""
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def options_of(kind: type) -> tuple[Declared, ...]:
    """Return the options that the config class ``kind`` declares, in the order of its fields."""
    if kind not in _DECLARED:
        _DECLARED[kind] = tuple(_declared(kind))
    return _DECLARED[kind]


def _declared(kind: type) -> Iterator[Declared]:
    for entry in dataclasses.fields(kind):
        if _KEY in entry.metadata:
            plain, optional = _plain(hints_of(kind)[entry.name])
            default = None if entry.default is MISSING else entry.default
            yield Declared(entry.name, plain, optional, default, entry.metadata[_KEY])


def _plain(hint: Any) -> tuple[type, bool]:
    """Return the type behind ``hint``, and whether None is a value, too."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType), True
    origin = typing.get_origin(hint)
    return (origin if isinstance(origin, type) else hint), False


def changed_options(config: object, usual: object | None = None) -> dict[str, object]:
    """Return name -> value of the options of ``config`` that differ from ``usual``, by default the class's own defaults."""
    kind = type(config)
    result = {}
    for declared in options_of(kind):
        value = getattr(config, declared.name)
        if value != (declared.default if usual is None else getattr(usual, declared.name)):
            result[declared.name] = value
    return result


def check_options(config: object) -> None:
    """Take the values of ``config`` if each lies within what its option allows.

    Raises:
        ConfigError: one does not; it is named with what is allowed.
    """
    for declared in options_of(type(config)):
        value, about = getattr(config, declared.name), declared.option
        name = declared.name.replace("_", " ")
        if value is None and declared.optional:
            continue
        if about.choices and value not in about.choices:
            raise ConfigError(f"{name} must be one of {', '.join(about.choices)}; got {value!r}.")
        if about.minimum is not None and value < about.minimum:
            raise ConfigError(f"{name} must be at least {about.minimum:g}, got {value}.")
        if about.maximum is not None and value > about.maximum:
            raise ConfigError(f"{name} must be at most {about.maximum:g}, got {value}.")


def renamed(kind: type, mapping: Mapping[str, object]) -> dict[str, object]:
    """Return ``mapping`` with today's names and values where a file of an earlier version has others."""
    result = dict(mapping)
    for declared in options_of(kind):
        for old in declared.option.formerly:
            if old in result:
                result.setdefault(declared.name, result.pop(old))
        value = result.get(declared.name)
        if isinstance(value, str):
            result[declared.name] = declared.option.values_formerly.get(value, value)
    return result

"""Widgets generated from config options: label, help, choices and bounds come from the field."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import streamlit as st

from lowrank_core.catalogue import registered
from lowrank_core.config.options import Declared, options_of

__all__ = ["draw"]


def draw(kind: type, name: str, *, key: str, place: Any = st, usual: object | None = None, **about: Any) -> Any:
    """Draw the widget of the option ``name`` of the config class ``kind``, and return its value.

    Args:
        place: container or column.
        usual: what the widget begins with; the option's default where None.
        about: arguments of the Streamlit widget that this form has otherwise, such as ``disabled``, ``label`` or ``help``.
    """
    declared = next(entry for entry in options_of(kind) if entry.name == name)
    about = {"help": _sentence(declared.option.help), "persist_state": "session", "key": key, **about}
    label = about.pop("label", declared.label)
    begin = declared.default if usual is None else usual
    choices: Collection[str] = about.pop("choices", None) or declared.option.choices or registered(name)
    if declared.type is bool:
        return place.toggle(label, value=begin, **about)
    if choices:
        options = list(choices)
        labels = choices if isinstance(choices, Mapping) else {}
        index = options.index(begin) if begin in options else 0
        return place.selectbox(label, options, index, format_func=lambda value: labels.get(value, value), **about)
    if declared.type in (int, float):
        return _number(declared, label, begin, place, about)
    return place.text_input(label, value=begin, **about)


def _number(declared: Declared, label: str, begin: Any, place: Any, about: dict[str, Any]) -> Any:
    option, cast = declared.option, declared.type
    if declared.optional:
        about = {"placeholder": option.fallback, **about}
    bounds = {"min_value": option.minimum, "max_value": option.maximum, "step": option.step}
    given = {name: cast(value) for name, value in bounds.items() if value is not None}
    if cast is float:
        given = {"format": "%g", **given}
    value = place.number_input(label, value=None if begin is None else cast(begin), **{**given, **about})
    return None if value is None else cast(value)


def _sentence(help: str) -> str:
    return f"{help[0].upper()}{help[1:].rstrip('.')}."

"""Widgets generated from config options, where label, help, choices and bounds come from the field; and buttons, choices and downloads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd
import streamlit as st

from lowrank_core.catalogue import registered
from lowrank_core.config.options import Declared, options_of
from lowrank_core.studio.shared.spreadsheet import csv_of

__all__ = ["choose", "draw", "draw_all", "offer", "pick", "pressed"]

T = TypeVar("T")

_MEDIA = {"csv": "text/csv", "html": "text/html", "json": "application/json", "md": "text/markdown", "zip": "application/zip"}
"""Ending of a file -> its media type."""


def draw(kind: type, name: str, *, key: str, place: Any = st, usual: object | None = None, **about: Any) -> Any:
    """Draw the widget of the option ``name`` of the config class ``kind``, and return its value.

    Args:
        place: container or column.
        usual: what the widget begins with; the option's default where None.
        about: arguments of the Streamlit widget that this form has otherwise, such as ``disabled``, ``label``, ``help`` or ``choices``;
            ``side_by_side`` shows all choices at once.
    """
    declared = next(entry for entry in options_of(kind) if entry.name == name)
    about = {"help": _sentence(declared.option.help), "persist_state": "session", "key": key, **about}
    label = about.pop("label", declared.label)
    begin = declared.default if usual is None else usual
    side_by_side = about.pop("side_by_side", False)
    choices: Collection[Any] = about.pop("choices", None) or declared.option.choices or registered(name)
    labels: Mapping[Any, str] = choices if isinstance(choices, Mapping) else {choice: str(choice) for choice in choices}
    if declared.type is bool:
        return place.toggle(label, value=begin, **about)
    if declared.type is tuple:
        return tuple(_several(declared, label, labels, begin, place, about))
    if side_by_side:
        return choose(label, labels, place=place, default=begin, **about)
    if labels:
        return pick(label, labels, begin, place=place, **about)
    if declared.type in (int, float):
        return _number(declared, label, begin, place, about)
    return place.text_input(label, value=begin, **about)


def draw_all(kind: type, keys: Mapping[str, str] | Iterable[str], places: Sequence[Any], prefix: str = "", **about: Any) -> dict[str, Any]:
    """Draw several options over ``places`` in turn; return name -> value. ``keys`` (name -> widget's key) are the names if not given."""
    named = keys if isinstance(keys, Mapping) else {name: name for name in keys}
    return {
        name: draw(kind, name, key=f"{prefix}{key}", place=places[index % len(places)], **about)
        for index, (name, key) in enumerate(named.items())
    }


def _several(declared: Declared, label: str, labels: Mapping[Any, str], begin: Any, place: Any, about: dict[str, Any]) -> Any:
    """Draw the choice of some of ``labels``: as pills where some are chosen from the start."""
    if begin:
        return place.pills(label, list(labels), selection_mode="multi", default=list(begin), format_func=labels.__getitem__, **about)
    about = {"placeholder": declared.option.fallback.capitalize() or None, **about}
    return place.multiselect(label, list(labels), format_func=labels.__getitem__, **about)


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


def choose(label: str, choices: Mapping[T, str], *, key: str, place: Any = st, **about: Any) -> T:
    """Draw a few choices (value -> label) side by side, one of which is always chosen, the first from the start; return its value."""
    about = {"default": next(iter(choices)), "persist_state": "session", "required": True, **about}
    value: T = place.segmented_control(label, list(choices), key=key, format_func=choices.__getitem__, **about)
    return value


def pick(label: str, choices: Mapping[T, str], begin: T | None = None, *, key: str, place: Any = st, **about: Any) -> T:
    """Draw a list of choices (value -> label) that begins with ``begin``, else the first; return the chosen value.

    A session may hold a value that is no choice any more: it is shown as it is until the next redraw.
    """
    values = list(choices)
    index = values.index(begin) if begin in choices else 0  # type: ignore[arg-type]
    value: T = place.selectbox(label, values, index, key=key, format_func=lambda value: choices.get(value, str(value)), **about)
    return value


def pressed(label: str, *, key: str, icon: str, why_not: str | None, place: Any = st, help: str | None = None, **about: Any) -> bool:
    """Draw a button, disabled where there is a reason ``why_not``, which is then its help; return whether it was pressed."""
    return bool(place.button(label, key=key, icon=icon, disabled=why_not is not None, help=why_not or help, **about))


def offer(
    label: str, file: str, content: pd.DataFrame | str | Callable[[], str | bytes], *, key: str, place: Any = st, **about: Any
) -> None:
    """Draw a download of ``file``, whose ending says its type: a table as CSV, a text, or what a function returns once it is asked for.

    A table or a text has an address made from its content, which holds for as long as the content is the same. What a function makes is
    asked for under a name that lasts until the button is drawn again, so a function is not for live parts of a page.
    """
    made = csv_of(content).encode() if isinstance(content, pd.DataFrame) else content
    about = {"icon": ":material/download:", "on_click": "ignore", **about}
    place.download_button(label, made, file, _MEDIA[file.rpartition(".")[2]], key=key, **about)

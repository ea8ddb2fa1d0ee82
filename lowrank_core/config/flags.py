"""Configs as the flags of a command line. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping

from lowrank_core.config.options import options_of

__all__ = ["command_line", "flags_of"]


def flags_of(config: object, usual: object | None = None, *, always: Collection[str] = ()) -> dict[str, object]:
    """Return flag (without dashes) -> value of the options in which ``config`` differs from ``usual``, and of those named in ``always``.

    Args:
        usual: what a command takes without flags; the defaults of the class where None.
    """
    result: dict[str, object] = {}
    for declared in options_of(type(config)):
        value = getattr(config, declared.name)
        begin = declared.default if usual is None else getattr(usual, declared.name)
        if value != begin or declared.name in always:
            flag = declared.flag.removeprefix("--")
            result[f"no-{flag}" if value is False else flag] = True if isinstance(value, bool) else value
    return result


def command_line(name: str, flags: Mapping[str, object]) -> str:
    """Return ``lowrank NAME`` with flags: True stands for a flag alone, a tuple for several values, and None is left out."""
    words = ["lowrank", name]
    for flag, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)

"""Shared validation of configs."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lowrank_core.errors import ConfigError

if TYPE_CHECKING:
    from lowrank_core.models import ModelHandle

__all__ = ["Continued", "check_min", "check_choice", "check_ratio"]


def check_ratio(compression_ratio: float) -> float:
    """Return ``compression_ratio`` if it is a fraction to remove, in (0, 1).

    Raises:
        ConfigError: it is not.
    """
    if not 0 < compression_ratio < 1:
        hint = "; 0 would remove nothing" if compression_ratio == 0 else ""
        raise ConfigError(
            f"compression ratio must lie between 0 and 1 (the fraction of parameters removed), got {compression_ratio:g}{hint}. Try 0.2."
        )
    return compression_ratio


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Take ``value`` if it is one of ``choices``.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_min(minimum: int, **values: int) -> None:
    """Take ``values``, called by their names, if all are ``least`` or more.

    Raises:
        ConfigError: one is not.
    """
    for name, value in values.items():
        if value < minimum:
            raise ConfigError(f"{name.replace('_', ' ')} must be at least {minimum}, got {value}.")


class Continued:
    """Config of prompts and their continuations."""

    prompt_tokens: int
    new_tokens: int

    def check_fits(self, handle: ModelHandle) -> None:
        """Raise unless prompt and continuation fit the model.

        Raises:
            ConfigError: they pass the positions that the model was made for.
        """
        limit = handle.max_context
        if limit is not None and self.prompt_tokens + self.new_tokens > limit:
            raise ConfigError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones pass the {limit} positions of {handle.reference}. "
                "Lower --prompt-tokens or --new-tokens."
            )

"""One reference to a model to be measured: a trial, an allocator's, a preset's, a quantised dense model, or a healed one. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_core.allocation import ALLOCATORS
from lowrank_core.errors import ConfigError

__all__ = ["ModelKey", "ModelRef"]

ModelKey = int | str
"""A reference as requests and answers have it in JSON: ``ModelRef.key``."""

_NAMED = ("preset", "dense", "healed")
_KINDS = ("best", "trial", "allocator", *_NAMED)


@dataclass(frozen=True)
class ModelRef:
    """A compressed model of a run.

    Attributes:
        kind: ``best`` (complete trial), ``trial``, ``allocator``, ``preset``, ``dense`` (quantised) or ``healed``.
        name: of the allocator, preset or quantised dense model, or the healed model's folder; the number of a trial in digits; empty for
            the best.
    """

    kind: str
    name: str = ""

    def __post_init__(self) -> None:
        assert self.kind in _KINDS

    @classmethod
    def find(cls, given: object) -> ModelRef | None:
        """Return what ``given`` refers to, or None if it is no reference: see ``parse``."""
        if isinstance(given, ModelRef):
            return given
        if given is None or given == "best":
            return cls("best")
        if type(given) is int and given >= 0:
            return cls("trial", str(given))
        if not isinstance(given, str):
            return None
        kind, colon, name = given.partition(":")
        if colon and kind in _NAMED:
            return cls(kind, name)
        if number := re.fullmatch(r"(?:trial )?(\d+)", given, re.ASCII):
            return cls("trial", number[1])
        return cls("allocator", given) if given in ALLOCATORS else None

    @classmethod
    def parse(cls, given: object) -> ModelRef:
        """Return what ``given`` refers to: a trial's number, None or ``best``, an allocator, ``preset:NAME``,
        ``dense:NAME`` or ``healed:FOLDER``.

        Raises:
            ConfigError: it is none of these. Whether the run has such a model is another question.
        """
        result = cls.find(given)
        if result is None:
            names = ", ".join(ALLOCATORS)
            raise ConfigError(f"trial must be a number, `best`, preset:NAME, dense:NAME, healed:FOLDER or one of {names}; got {given!r}.")
        return result

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.kind in _NAMED else self.name or "best"

    @property
    def number(self) -> int | None:
        """The number of a trial; None for all else."""
        return int(self.name) if self.kind == "trial" else None

    @property
    def key(self) -> ModelKey:
        """As it is in JSON: a trial by its number."""
        return str(self) if self.number is None else self.number

    @property
    def label(self) -> str:
        """Label of its measurements: ``trial 3``."""
        return str(self) if self.number is None else f"trial {self.number}"

    @property
    def searched(self) -> bool:
        """Whether it is an allocation of the run's own factors: such a model can be healed and exported."""
        return self.kind in ("best", "trial", "allocator")

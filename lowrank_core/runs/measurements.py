"""Measurements of a pair of models, dense and compressed: made with torch, read by pages. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass

__all__ = ["MemoryReport", "SpeedComparison", "SpeedReport", "Spread", "TextLosses"]


@dataclass(frozen=True)
class TextLosses:
    """Token-level losses of two models, in nats.

    Attributes:
        pieces: the characters of each of the T tokens, which joined are the text; empty for a token that ends inside a character.
        nll, dense_nll: -log q(token) and -log p(token) of the tokens after the first (T - 1,).
        kl: Σ p log(p / q) there.
        likeliest, dense_likeliest: the token that each model held likeliest there.
    """

    pieces: tuple[str, ...]
    nll: tuple[float, ...]
    dense_nll: tuple[float, ...]
    kl: tuple[float, ...]
    likeliest: tuple[str, ...]
    dense_likeliest: tuple[str, ...]


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        result = list(values)
        return cls(statistics.median(result), min(result), max(result))

    def words(self, factor: float = 1.0, digits: int = 0) -> str:
        """Return ``factor`` times the values: ``12.3 (11.9 to 14.0)``."""
        middle, low, high = (f"{factor * value:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class MemoryReport:
    """Peaks in bytes, None where the system does not tell them.

    Attributes:
        loading: while the model was loaded.
        running: afterwards, while prompts were read and continued.
        measured: what the peaks include.
    """

    loading: int | None
    running: int | None
    measured: str


@dataclass(frozen=True)
class SpeedReport:
    """Measurements of one model.

    Attributes:
        prefill_tokens_per_second: prompt tokens of all prompts over the time that reading them took.
        decode_tokens_per_second: tokens after the first of all prompts over the time that writing them took.
        first_token_seconds: from the prompt to the first new token.
        memory: None where it was not measured.
        protocol: how all this was measured.
        parameters, bytes: of the model, stored; 0 in a report of an earlier version.
    """

    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    first_token_seconds: Spread
    protocol: str
    memory: MemoryReport | None = None
    model: str = ""
    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class SpeedComparison:
    """A dense and a compressed model, round by round.

    Attributes:
        dense, compressed: each by itself.
        prefill_speedup, decode_speedup, first_token_speedup: time of the dense model over that of the compressed one in the same round;
            above 1 the compressed one is faster.
    """

    dense: SpeedReport
    compressed: SpeedReport
    prefill_speedup: Spread
    decode_speedup: Spread
    first_token_speedup: Spread

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory while running, compressed over dense; None where it was not measured."""
        ours, theirs = self.compressed.memory, self.dense.memory
        if ours is None or theirs is None or ours.running is None or not theirs.running:
            return None
        return ours.running / theirs.running

    def to_mapping(self) -> dict[str, object]:
        """Return the comparison ready for JSON, its memory ratio with it."""
        return {**asdict(self), "memory_ratio": self.memory_ratio}

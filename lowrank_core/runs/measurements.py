"""Measurements of a pair of models, dense and compressed: made with torch, read by pages. Torch-free.

Behaviour is measured on continuations::

    repeated 4-grams    1 - distinct / all 4-grams of a continuation: the share that occurred before in it, seq-rep-4 of
                        arXiv 1908.04319; a mean over continuations of at least four tokens
    ended               share of continuations that an end token ended before the limit
    length              new tokens of a continuation, without the end token; a mean, and its ratio to the dense model's
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass

__all__ = [
    "Behaviour",
    "BehaviourComparison",
    "ContinuationFacts",
    "MemoryReport",
    "SpeedComparison",
    "SpeedReport",
    "Spread",
    "TextLosses",
]


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


_NO_END_TOKEN = "no end token"


@dataclass(frozen=True)
class ContinuationFacts:
    """Behaviour of a model in one continuation.

    Attributes:
        tokens: new ones, without the end token.
        repeated: share of its 4-grams that occurred before in it, in [0, 1]; None below four tokens.
        ended: whether an end token ended it; None where the model has none.
    """

    tokens: int
    repeated: float | None
    ended: bool | None

    @classmethod
    def of(cls, tokens: Sequence[int], ends: Collection[int]) -> ContinuationFacts:
        """Return the facts of ``tokens``, whatever follows the first of the end tokens ``ends`` left out."""
        own = next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens)
        grams = [tuple(own[place : place + 4]) for place in range(len(own) - 3)]
        return cls(len(own), 1 - len(set(grams)) / len(grams) if grams else None, len(own) < len(tokens) if ends else None)

    def words(self, dense: ContinuationFacts | None = None) -> str:
        """Return them in a line, the length next to that of the ``dense`` model's continuation."""
        ratio = "" if dense is None or not dense.tokens else f" ({self.tokens / dense.tokens:.2f}x dense)"
        ending = {None: _NO_END_TOKEN, True: "ended by itself", False: "cut at the limit"}[self.ended]
        repeated = "" if self.repeated is None else f"repeated 4-grams {self.repeated:.1%}, "
        return f"{self.tokens} tokens{ratio}, {repeated}{ending}"


@dataclass(frozen=True)
class Behaviour:
    """Behaviour of one model over the continuations of several prompts."""

    continuations: tuple[ContinuationFacts, ...]

    @property
    def repeated(self) -> float | None:
        """Mean share of repeated 4-grams; None where every continuation is shorter than four tokens."""
        known = [each.repeated for each in self.continuations if each.repeated is not None]
        return statistics.fmean(known) if known else None

    @property
    def ended(self) -> float | None:
        """Share of continuations that ended by themselves; None where the model has no end token."""
        known = [each.ended for each in self.continuations if each.ended is not None]
        return statistics.fmean(known) if known else None

    @property
    def ended_words(self) -> str:
        return _NO_END_TOKEN if self.ended is None else f"{self.ended:.1%}"

    @property
    def tokens(self) -> float:
        """Mean length."""
        return statistics.fmean(each.tokens for each in self.continuations)

    def to_mapping(self) -> dict[str, object]:
        """Return it ready for JSON."""
        continuations = [asdict(each) for each in self.continuations]
        return {"repeated_4grams": self.repeated, "ended": self.ended, "tokens": self.tokens, "continuations": continuations}


@dataclass(frozen=True)
class BehaviourComparison:
    """Behaviour of a model, next to the dense one if there is one.

    Attributes:
        protocol: prompts and continuations, in a line.
    """

    compressed: Behaviour
    protocol: str
    dense: Behaviour | None = None

    @property
    def length_ratio(self) -> float | None:
        """Mean length over the dense model's; None without one, or where it writes nothing."""
        return self.compressed.tokens / self.dense.tokens if self.dense is not None and self.dense.tokens else None

    @property
    def rows(self) -> tuple[tuple[str, Behaviour, float | None], ...]:
        """Name, behaviour and length over dense of each model, the dense one first."""
        dense = () if self.dense is None else (("dense", self.dense, 1.0 if self.dense.tokens else None),)
        return (*dense, ("compressed", self.compressed, self.length_ratio))

    def to_mapping(self) -> dict[str, object]:
        """Return it ready for JSON."""
        return {"protocol": self.protocol, "length_over_dense": self.length_ratio} | {
            name: behaviour.to_mapping() for name, behaviour, _ in self.rows
        }


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

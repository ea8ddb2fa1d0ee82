"""One decoder: strict for what users wrote, lenient for what a worker wrote, and both know the names of earlier versions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lowrank_core.config.mapping import build, from_mapping
from lowrank_core.config.options import option
from lowrank_core.errors import ConfigError, LowRankError, RunError


@dataclass(frozen=True)
class Part:
    size: float


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    first: Part | None = None
    colour: str = option("red", "of all parts", formerly=("shade",), values_formerly={"crimson": "red"})
    count: int = 0


BODY = {"parts": [{"size": 1}, {"size": 2.5}], "first": {"size": 3}, "shade": "crimson"}
WANTED = Whole((Part(1.0), Part(2.5)), Part(3.0))


def test_both_modes_read_nested_records_and_earlier_names():
    assert from_mapping(Whole, BODY) == build(Whole, BODY, "an answer") == WANTED
    assert isinstance(from_mapping(Whole, BODY).parts[0].size, float)
    assert from_mapping(Whole, {**BODY, "first": None}).first is None
    assert build(Whole, {**BODY, "count": "ignored"}, "an answer", count=4).count == 4


def test_unknown_keys_are_refused_or_left_alone():
    with pytest.raises(ConfigError, match="Whole: unknown smell; it knows parts"):
        from_mapping(Whole, {**BODY, "smell": 1})
    with pytest.raises(ConfigError, match="Part: unknown smell"):
        from_mapping(Whole, {"parts": [{"size": 1, "smell": 1}]})
    assert build(Whole, {**BODY, "smell": 1, "first": {"size": 3, "smell": 1}}, "an answer") == WANTED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": True}, "count: expected int, got True"),
        ({"count": "3"}, "count: expected int, got '3'"),
        ({"parts": 3}, "parts: expected list, got 3"),
        ({"first": 3}, "Part: expected an object, got int"),
        ({"first": {}}, "has no 'size'"),
    ],
)
def test_a_wrong_value_is_one_clear_error(changes: dict[str, object], message: str):
    kinds: tuple[type[LowRankError], type[LowRankError]] = (ConfigError, RunError)
    for kind, read in zip(kinds, (lambda body: from_mapping(Whole, body), lambda body: build(Whole, body, "an answer")), strict=True):
        with pytest.raises(kind, match=message):
            read({**BODY, **changes})

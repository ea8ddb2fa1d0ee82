"""Measured speed and memory, the dense model next to each compressed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.config.mapping import build
from lowrank_core.runs import JsonMapping
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studio.compare.comparison import filed_as, of_kind
from lowrank_core.studio.shared.formatting import DASH, size
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import model_name

__all__ = ["Speed", "speed_numbers", "speed_spec", "speed_table", "speeds", "speedup_table"]

_MEASURES = {"prefill_speedup": "Prefill", "decode_speedup": "Decode", "first_token_speedup": "TTFT"}


@dataclass(frozen=True)
class _Spread:
    median: float
    low: float
    high: float

    def words(self, factor: float = 1.0, digits: int = 0) -> str:
        return f"{factor * self.median:,.{digits}f} ({factor * self.low:,.{digits}f} to {factor * self.high:,.{digits}f})"


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    prefill: _Spread
    decode: _Spread
    first_token: _Spread
    running: int | None
    loading: int | None
    parameters: int | None
    stored: int | None
    flops: int | None


@dataclass(frozen=True)
class Speed:
    """Timing of a compressed model in alternation with the dense model.

    Attributes:
        name: of the compressed model.
        protocol: batch, lengths, rounds, dtype, device; memory: what its peaks are, empty if they were not measured.
        setup: batch, lengths and rounds in short: what tells two timings of one model apart.
        dense, compressed: each by itself; speedups: time of the dense model over that of the compressed model in the same round.
    """

    name: str
    protocol: str
    memory: str
    dense: _Side
    compressed: _Side
    speedups: Mapping[str, _Spread]
    setup: str = ""


def speeds(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> list[Speed]:
    """Return the newest timing of each model at each batch and length, the newest first.

    Raises:
        RunError: an answer is damaged.
    """
    newest: dict[tuple[str, str], Speed] = {}
    for body in of_kind(bodies, "speed"):
        key = str(body.get("trial")), str(body.get("config"))
        newest.pop(key, None)
        newest[key] = _speed(body, trials)
    return list(reversed(newest.values()))


def _part(body: Mapping[str, object], name: str) -> Mapping[str, object]:
    result = body.get(name)
    return result if isinstance(result, Mapping) else {}


def _spread(body: Mapping[str, object], name: str) -> _Spread:
    return build(_Spread, _part(body, name), f"a timing: {name}")


def _speed(body: JsonMapping, trials: Sequence[TrialRecord]) -> Speed:
    compressed = _part(body, "compressed")
    return Speed(
        name=model_name(filed_as(body), trials),
        protocol=str(compressed.get("protocol", "")),
        memory=str(_part(compressed, "memory").get("measured", "")),
        dense=_side(_part(body, "dense"), body.get("dense_flops")),
        compressed=_side(compressed, body.get("flops")),
        speedups={name: _spread(body, name) for name in _MEASURES},
        setup=_setup(_part(body, "config")),
    )


def _setup(config: Mapping[str, object]) -> str:
    """Return ``batch 1, 128 + 64 tokens, 7 rounds``; empty where an answer does not say."""
    sizes = [config.get(name) for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds")]
    return "batch {}, {} + {} tokens, {} rounds".format(*sizes) if None not in sizes else ""


def _side(body: Mapping[str, object], flops: object) -> _Side:
    memory = _part(body, "memory")
    counts = (memory.get("running"), memory.get("loading"), body.get("parameters"), body.get("bytes"), flops)
    return _Side(
        _spread(body, "prefill_tokens_per_second"),
        _spread(body, "decode_tokens_per_second"),
        _spread(body, "first_token_seconds"),
        *(count if isinstance(count, int) else None for count in counts),
    )


def speed_table(speed: Speed) -> pd.DataFrame:
    """Return measurements as text, median (min to max): columns measure, dense, compressed, faster (times, or share of memory)."""
    dense, ours = speed.dense, speed.compressed
    times = {name: spread.words(digits=2) for name, spread in speed.speedups.items()}
    rows = [
        ("Prefill, tokens/s", dense.prefill.words(), ours.prefill.words(), times["prefill_speedup"]),
        ("Decode, tokens/s", dense.decode.words(), ours.decode.words(), times["decode_speedup"]),
        ("TTFT, ms", dense.first_token.words(1e3, 1), ours.first_token.words(1e3, 1), times["first_token_speedup"]),
    ]
    if speed.memory:
        rows += [
            ("Peak memory, running", size(dense.running), size(ours.running), _share(ours.running, dense.running)),
            ("Peak memory, loading", size(dense.loading), size(ours.loading), _share(ours.loading, dense.loading)),
        ]
    counts = (
        ("Parameters", dense.parameters, ours.parameters, "{:,}".format),
        ("Stored", dense.stored, ours.stored, size),
        ("FLOPs per token, linears and head", dense.flops, ours.flops, "{:,}".format),
    )
    rows += [(name, words(a), words(b), _share(b, a)) for name, a, b, words in counts if a is not None and b is not None]
    return pd.DataFrame(rows, columns=["measure", "dense", "compressed", "faster"])


def speed_spec(speed: Speed, number: int = 1) -> Table:
    """Return ``speed_table`` as it is shown; ``number`` tells several in one report apart."""
    columns = (
        Column.text("measure", "Median (min to max)", width="medium"),
        Column.text("dense", "Dense"),
        Column.text("compressed", "Compressed"),
        Column.text("faster", "Speed-up", "Round by round; for memory and counts, compressed over dense."),
    )
    return Table(speed_table(speed), columns, f"{speed.name} next to the dense model. {speed.protocol}", f"speed-{number}")


def _share(ours: int | None, theirs: int | None) -> str:
    return DASH if ours is None or not theirs else f"{ours / theirs:.2f}x"


def speedup_table(result: Sequence[Speed]) -> pd.DataFrame:
    """Return columns name, measure, median, low, high of the speed-up over the dense model.

    A model that was timed at several batches or lengths has a name for each.
    """
    names = [speed.name for speed in result]
    rows = [
        (
            f"{speed.name}, {speed.setup}" if names.count(speed.name) > 1 else speed.name,
            label,
            speed.speedups[name].median,
            speed.speedups[name].low,
            speed.speedups[name].high,
        )
        for speed in result
        for name, label in _MEASURES.items()
    ]
    return pd.DataFrame(rows, columns=["name", "measure", "median", "low", "high"])


def speed_numbers(result: Sequence[Speed]) -> pd.DataFrame:
    """Return all values, a row per model and side: rates as median, low and high, memory in bytes, the protocol."""
    rows = []
    for speed in result:
        for side, figures in (("dense", speed.dense), ("compressed", speed.compressed)):
            row: dict[str, object] = {"name": speed.name, "side": side}
            for name, spread in (
                ("prefill_tokens_per_second", figures.prefill),
                ("decode_tokens_per_second", figures.decode),
                ("first_token_seconds", figures.first_token),
            ):
                row |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
            rows.append(row | {"running_bytes": figures.running, "loading_bytes": figures.loading, "protocol": speed.protocol})
    return pd.DataFrame(rows)

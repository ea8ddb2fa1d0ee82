"""Measured speed and memory, the dense model next to each compressed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lowrank_core.runs import JsonMapping
from lowrank_core.runs.measurements import SpeedReport, Spread
from lowrank_core.studies.records import TrialRecord
from lowrank_core.studies.requests import SpeedAnswer, answers_in
from lowrank_core.studio.shared.formatting import DASH, sizes
from lowrank_core.studio.shared.table import Column, Table
from lowrank_core.studio.shared.trial_names import model_name

__all__ = ["Speed", "speed_numbers", "speed_spec", "speed_table", "speeds", "speedup_table"]

_MEASURES = {"prefill_speedup": "Prefill", "decode_speedup": "Decode", "first_token_speedup": "TTFT"}


@dataclass(frozen=True)
class Speed:
    """Timing of a compressed model in alternation with the dense model.

    Attributes:
        name: of the compressed model.
        protocol: batch, lengths, rounds, dtype, device; memory: what its peaks are, empty if they were not measured.
        setup: batch, lengths and rounds in short: what tells two timings of one model apart.
        dense, compressed: each by itself; flops: of both for one token, where they were counted.
        speedups: time of the dense model over that of the compressed model in the same round.
    """

    name: str
    protocol: str
    memory: str
    dense: SpeedReport
    compressed: SpeedReport
    flops: tuple[int | None, int | None]
    speedups: Mapping[str, Spread]
    setup: str = ""


def speeds(bodies: Sequence[JsonMapping], trials: Sequence[TrialRecord] = ()) -> list[Speed]:
    """Return the newest timing of each model at each batch and length, the newest first.

    Raises:
        RunError: an answer is damaged.
    """
    newest: dict[tuple[str, str], Speed] = {}
    for answer in answers_in(bodies, SpeedAnswer):
        key = str(answer.trial), str(answer.config)
        newest.pop(key, None)
        newest[key] = _speed(answer, trials)
    return list(reversed(newest.values()))


def _speed(answer: SpeedAnswer, trials: Sequence[TrialRecord]) -> Speed:
    compressed = answer.result.compressed
    return Speed(
        name=model_name(answer.filed_as, trials),
        protocol=compressed.protocol,
        memory="" if compressed.memory is None else compressed.memory.measured,
        dense=answer.result.dense,
        compressed=compressed,
        flops=(answer.dense_flops, answer.flops),
        speedups={name: getattr(answer.result, name) for name in _MEASURES},
        setup=_setup(answer.config),
    )


def _setup(config: Mapping[str, object]) -> str:
    """Return ``batch 1, 128 + 64 tokens, 7 rounds``; empty where an answer does not say."""
    sizes = [config.get(name) for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds")]
    return "batch {}, {} + {} tokens, {} rounds".format(*sizes) if None not in sizes else ""


def speed_table(speed: Speed) -> pd.DataFrame:
    """Return measurements as text, median (min to max): columns measure, dense, compressed, faster (times, or share of memory)."""
    dense, ours = speed.dense, speed.compressed
    times = {name: spread.words(digits=2) for name, spread in speed.speedups.items()}
    rows = [
        ("Prefill, tokens/s", *(each.prefill_tokens_per_second.words() for each in (dense, ours)), times["prefill_speedup"]),
        ("Decode, tokens/s", *(each.decode_tokens_per_second.words() for each in (dense, ours)), times["decode_speedup"]),
        ("TTFT, ms", *(each.first_token_seconds.words(1e3, 1) for each in (dense, ours)), times["first_token_speedup"]),
    ]
    if speed.memory:
        for when in ("running", "loading"):
            peaks = [getattr(each.memory, when, None) for each in (dense, ours)]
            rows.append((f"Peak memory, {when}", *sizes(peaks), _share(peaks[1], peaks[0])))
    counts = (
        ("Parameters", (dense.parameters, ours.parameters), _whole),
        ("Stored", (dense.bytes, ours.bytes), sizes),
        ("FLOPs per token, linears and head", speed.flops, _whole),
    )
    rows += [(name, *words((a, b)), _share(b, a)) for name, (a, b), words in counts if a and b]
    return pd.DataFrame(rows, columns=["measure", "dense", "compressed", "faster"])


def _whole(counts: Iterable[float]) -> list[str]:
    return [f"{count:,}" for count in counts]


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
            for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds"):
                spread: Spread = getattr(figures, name)
                row |= {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
            peaks = {f"{when}_bytes": getattr(figures.memory, when, None) for when in ("running", "loading")}
            rows.append(row | peaks | {"protocol": speed.protocol})
    return pd.DataFrame(rows)

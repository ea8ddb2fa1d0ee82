"""What things cost, as ratios against something in the same run: machines are noisy, ratios less so."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_core.accounting import MatrixShape, Unit
from lowrank_core.allocation import Ranks
from lowrank_core.calibration import collect_statistics
from lowrank_core.compression import low_rank_layers, swapped
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, TextConfig
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.models.storage import Factors, build_layers
from lowrank_core.recipe import Decomposed, decompose
from lowrank_core.text import WindowSet, load_windows

__all__ = ["SpeedRow", "as_markdown", "speed_table"]

_ROUNDS = 7
SIZES = ((256, 256), (1024, 1024), (4096, 1024), (1024, 4096))
SHAPES = (("prefill", 512), ("decode", 1))
RATIOS = (0.2, 0.4, 0.6)


@dataclass(frozen=True)
class SpeedRow:
    """Time of ``what`` over the time of ``against``, measured in turns.

    Attributes:
        ratio: of the medians; low, high: smallest and largest ratio of a single turn.
    """

    what: str
    against: str
    detail: str
    ratio: float
    low: float
    high: float
    turns: int

    def to_mapping(self) -> dict[str, object]:
        return asdict(self)


def _seconds(action: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def compared(what: str, action: Callable[[], object], against: str, other: Callable[[], object], detail: str) -> SpeedRow:
    """Run both in turns, once before to warm up, and compare."""
    _seconds(action, 1)
    repeats = max(1, round(0.02 / max(_seconds(other, 1), 1e-6)))
    turns = [(_seconds(action, repeats), _seconds(other, repeats)) for _ in range(_ROUNDS)]
    ratios = [ours / theirs for ours, theirs in turns]
    median = statistics.median(ours for ours, _ in turns) / statistics.median(theirs for _, theirs in turns)
    return SpeedRow(what, against, detail, median, min(ratios), max(ratios), _ROUNDS)


def speed_table(source: ModelSource, text: TextConfig) -> list[SpeedRow]:
    """Compare calibration and a trial with forward passes, and layers with dense ones.

    Raises:
        LowRankError: model or text can't be used.
    """
    handle = load_model(source)
    windows = load_windows(text, handle.tokenizer, "calibration", count=text.calibration_windows)
    rows = [_calibration(handle, windows)]
    print("calibration: done", file=sys.stderr, flush=True)
    rows += _trial(handle, windows, load_windows(text, handle.tokenizer, "validation", count=text.validation_windows))
    print("trial: done", file=sys.stderr, flush=True)
    rows += _layers(handle.device, handle.module.dtype)
    return rows


@torch.no_grad()
def _forward(handle: ModelHandle, windows: WindowSet, batch_size: int = 8) -> None:
    for ids in torch.split(windows.ids, batch_size):
        handle.module(input_ids=ids.to(handle.device), use_cache=False)


def _calibration(handle: ModelHandle, windows: WindowSet) -> SpeedRow:
    return compared(
        "calibration",
        lambda: collect_statistics(handle, windows, CalibrationConfig()),
        "plain forward passes over the same tokens",
        lambda: _forward(handle, windows),
        f"{windows.windows} windows of {windows.context} tokens",
    )


def _trial(handle: ModelHandle, calibration: WindowSet, validation: WindowSet) -> Iterator[SpeedRow]:
    statistics_ = collect_statistics(handle, calibration, CalibrationConfig())
    decomposed = decompose(handle, statistics_, CompressionConfig())
    dense = DenseReference.compute(handle, validation, batch_size=8)
    for ratio in (0.2, 0.4):
        ranks = decomposed.allocate("uniform", ratio).ranks
        detail = f"ratio {ratio:g}, {validation.windows} windows of {validation.context} tokens"
        yield compared(
            "a search trial",
            partial(_one_trial, decomposed, ranks, validation, dense),
            "a forward pass of the same compressed model",
            partial(_forward_with, handle, _layers_at(decomposed, ranks), validation),
            detail,
        )


def _layers_at(decomposed: Decomposed, ranks: Ranks) -> dict[str, nn.Module]:
    return low_rank_layers(decomposed.handle, decomposed.bases, ranks, storage="factored")


def _one_trial(decomposed: Decomposed, ranks: Ranks, validation: WindowSet, dense: DenseReference) -> None:
    with swapped(decomposed.handle, _layers_at(decomposed, ranks)):
        score_windows(decomposed.handle, validation, batch_size=8, dense=dense)


def _forward_with(handle: ModelHandle, layers: dict[str, nn.Module], windows: WindowSet) -> None:
    with swapped(handle, layers):
        _forward(handle, windows)


def _layers(device: torch.device, dtype: torch.dtype) -> Iterator[SpeedRow]:
    generator = torch.Generator().manual_seed(0)
    for d_out, d_in in SIZES:
        dense = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
        for storage in ("factored", "pivoted"):
            for ratio in RATIOS:
                yield from _layer(dense.to(device, dtype), storage, ratio)
        print(f"layers {d_out} x {d_in}: done", file=sys.stderr, flush=True)


def _layer(dense: Tensor, storage: str, ratio: float) -> Iterator[SpeedRow]:
    d_out, d_in = dense.shape
    unit = Unit((MatrixShape("layer", "layer", 0, d_out, d_in),), storage)
    rank = unit.rank_for_parameters((1 - ratio) * unit.dense_parameters)
    assert rank is not None
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((d_out, rank), (rank, d_in)))
    layer = build_layers(["layer"], Factors((up,), down, (None,)), storage, [dense])["layer"]
    for phase, tokens in SHAPES:
        x = torch.randn(tokens, d_in, generator=generator).to(dense)
        with torch.no_grad():
            yield compared(
                f"{storage} layer, {phase}",
                partial(layer, x),
                "the dense layer",
                partial(nn.functional.linear, x, dense),
                f"{d_out} x {d_in}, ratio {ratio:g} (rank {rank}), {tokens} tokens",
            )


def as_markdown(rows: Sequence[SpeedRow]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | against | detail | time ratio (smallest to largest of the turns) |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.what} | {row.against} | {row.detail} | {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) |" for row in rows]
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    return "\n".join([*lines, "", f"Below 1 is faster. {_ROUNDS} turns each; {threads}."])

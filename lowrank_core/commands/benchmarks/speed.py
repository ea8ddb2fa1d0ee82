"""Benchmark of costs as ratios within one run: machines are noisy, ratios less so."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lowrank_core.allocation import Ranks
from lowrank_core.catalogue import as_markdown
from lowrank_core.commands.benchmarks.layer_speed import layer_rows
from lowrank_core.commands.benchmarks.speed_rows import TURNS, SpeedRow, compared
from lowrank_core.compression.decomposed import Decomposed, decompose
from lowrank_core.config import CalibrationConfig, CompressionConfig, ModelSource, TextConfig, to_mapping
from lowrank_core.config.benchmarks import SpeedBenchmark
from lowrank_core.evaluation import DenseReference, score_windows
from lowrank_core.models import ModelHandle, load_model
from lowrank_core.statistics.calibration import collect_statistics
from lowrank_core.text import WindowSet, load_windows
from lowrank_core.types import Result

__all__ = ["SpeedRow", "benchmark", "compared", "markdown_of", "speed_table"]


def benchmark(source: ModelSource, text: TextConfig, config: SpeedBenchmark) -> Result:
    """Compare calibration, a trial and the layers with forward passes and dense layers."""
    rows = speed_table(source, text)
    return {"model": source.reference, "rows": [to_mapping(row) for row in rows], "text": markdown_of(rows)}


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
    rows += layer_rows(handle.device, handle.module.dtype)
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
            partial(_forward_at, decomposed, ranks, validation),
            detail,
        )


def _one_trial(decomposed: Decomposed, ranks: Ranks, validation: WindowSet, dense: DenseReference) -> None:
    with decomposed.swapped(ranks):
        score_windows(decomposed.handle, validation, batch_size=8, dense=dense)


def _forward_at(decomposed: Decomposed, ranks: Ranks, windows: WindowSet) -> None:
    with decomposed.swapped(ranks):
        _forward(decomposed.handle, windows)


def markdown_of(rows: Sequence[SpeedRow]) -> str:
    """Return the rows as a Markdown table."""
    threads = torch.get_num_threads()
    place = f"{threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"
    cached = "A layer that is called alone may stay in the processor's caches; in a model its weights come from memory."
    table = as_markdown(
        {
            "what": row.what,
            "against": row.against,
            "detail": row.detail,
            "time ratio (smallest to largest of the turns)": f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
            "FLOPs ratio": "–" if row.expected is None else f"{row.expected:.2f}",
            "verdict": row.verdict or "–",
        }
        for row in rows
    )
    return f"{table}\n\nBelow 1 is faster. {TURNS} turns each, who goes first alternates; {place}. {cached}"

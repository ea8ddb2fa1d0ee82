"""Measuring a model on windows of text: perplexity, and how far it is from the dense one.

Notation::

    p, q     next-token distributions of the dense and of the compressed model
    NLL      mean over all scored tokens of -log q(token), in nats;  perplexity = exp(NLL)
    KL       mean over tokens of Σ p log(p / q);  reverse KL: Σ q log(q / p)
    stderr   standard error of the mean NLL, from the spread of window means
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from lowrank_core.errors import NumericalError
from lowrank_core.evaluation.intervals import Sample, sample_of
from lowrank_core.evaluation.positions import PositionRow, position_rows
from lowrank_core.evaluation.scoring import WindowScores, score_tokens
from lowrank_core.evaluation.tokens import TokenScores
from lowrank_core.evaluation.warnings import uniform_warning, window_warning
from lowrank_core.models.handle import ModelHandle
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["EvaluationReport", "evaluate"]


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics of one model on one set of windows, with their protocol.

    Intervals are of 95 %, by bootstrap over windows (of a stride: over runs of windows that score about a context of tokens). None where
    there is none: from a single window, and where windows do not differ.

    Attributes:
        perplexity_difference_interval: of the difference to the dense model on the same windows (paired).
        perplexity_ratio_interval: of compressed / dense perplexity, drawn the same way: two texts can be held against each other.
        kl, reverse_kl: Σ p log(p / q) and Σ q log(q / p) per token, in nats.
        top1_agreement: share of tokens where both models have the same likeliest next token.
        top5_agreement: mean share |A ∩ B| / 5 that the two models' five likeliest next tokens A and B have in common.
        window_nll, dense_window_nll, window_kl: mean over the scored tokens of each window, in nats.
        stride: tokens from one window to the next where they overlap; None where they do not.
        by_position: the same metrics over ranges of positions in the context.
        warnings: caveats, in sentences.
    """

    dataset: str
    split: str
    context: int
    windows: int
    tokens: int
    bos: str
    protocol: str
    perplexity: float
    nll: float
    nll_stderr: float | None
    perplexity_interval: tuple[float, float] | None
    parameters: int
    compressible_parameters: int
    bytes: int
    seconds: float
    window_nll: tuple[float, ...]
    dense_perplexity: float | None = None
    dense_nll: float | None = None
    dense_parameters: int | None = None
    dense_compressible_parameters: int | None = None
    dense_bytes: int | None = None
    compression_ratio: float | None = None
    model_compression_ratio: float | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    dense_perplexity_interval: tuple[float, float] | None = None
    perplexity_difference_interval: tuple[float, float] | None = None
    dense_window_nll: tuple[float, ...] | None = None
    reverse_kl: float | None = None
    reverse_kl_interval: tuple[float, float] | None = None
    top5_agreement: float | None = None
    stride: int | None = None
    by_position: tuple[PositionRow, ...] | None = None
    perplexity_ratio_interval: tuple[float, float] | None = None
    window_kl: tuple[float, ...] | None = None
    warnings: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, object]:
        """Return the report ready for JSON, without comparisons if there was no dense model; no interval is null."""
        left_out = {f.name for f in fields(self) if f.default is None}
        if self.dense_perplexity is not None:
            left_out -= {name for name in left_out if name.endswith("_interval")}
        result = {name: value for name, value in asdict(self).items() if value is not None or name not in left_out}
        if self.by_position is not None:
            result["by_position"] = [row.to_mapping() for row in self.by_position]
        return result


def evaluate(
    handle: ModelHandle, windows: WindowSet, *, against: ModelHandle | None = None, batch_size: int = 8, progress: Progress | None = None
) -> EvaluationReport:
    """Measure ``handle`` on ``windows``, next to the dense model ``against`` if given; ``score_tokens`` says what memory that takes.

    Raises:
        NumericalError: a window's loss is not finite.
        ModelError: the windows do not fit the model, or the two models do not share a vocabulary.
    """
    handle.check_tokens(windows.ids)
    if against is not None:
        handle.check_vocabulary(against)
    began = time.perf_counter()
    tokens = score_tokens(handle, windows, batch_size=batch_size, dense=against, progress=progress)
    nll = sample_of(tokens.nll, windows)
    return EvaluationReport(
        dataset=windows.dataset,
        split=windows.split,
        context=windows.context,
        windows=windows.windows,
        tokens=windows.predicted_tokens,
        bos="window" if windows.bos else "none",
        protocol=windows.protocol,
        perplexity=_perplexity(nll.mean),
        nll=nll.mean,
        nll_stderr=nll.stderr,
        perplexity_interval=nll.interval(np.exp),
        parameters=handle.parameters,
        compressible_parameters=handle.linear_parameters if against is None else handle.linear_parameters_beside(against)[0],
        bytes=handle.bytes,
        seconds=time.perf_counter() - began,
        window_nll=tuple(WindowScores.of(tokens, windows.scored).nll.tolist()),
        stride=windows.stride,
        by_position=position_rows(tokens, windows.scored),
        warnings=_warnings(handle, against, tokens, windows),
        **_beside_dense(handle, against, tokens, windows),  # type: ignore[arg-type]
    )


def _beside_dense(handle: ModelHandle, against: ModelHandle | None, tokens: TokenScores, windows: WindowSet) -> dict[str, object]:
    if against is None:
        return {}
    ours, theirs, kl, reverse, top1, top5 = _samples(tokens, windows)
    assert tokens.dense_nll is not None
    windowed = WindowScores.of(replace(tokens, nll=tokens.dense_nll), windows.scored)
    assert windowed.kl is not None
    kept, dense = handle.linear_parameters_beside(against)
    return {
        "dense_perplexity": _perplexity(theirs.mean),
        "dense_nll": theirs.mean,
        "dense_perplexity_interval": theirs.interval(np.exp),
        "dense_parameters": against.parameters,
        "dense_compressible_parameters": dense,
        "dense_bytes": against.bytes,
        "compression_ratio": 1 - kept / dense,
        "model_compression_ratio": 1 - handle.parameters / against.parameters,
        "kl": max(0.0, kl.mean),  # below zero is rounding
        "kl_interval": kl.interval(),
        "reverse_kl": max(0.0, reverse.mean),
        "reverse_kl_interval": reverse.interval(),
        "top1_agreement": top1.mean,
        "top5_agreement": top5.mean,
        "perplexity_difference_interval": ours.alongside(theirs).interval(lambda pair: np.exp(pair[..., 0]) - np.exp(pair[..., 1])),
        "perplexity_ratio_interval": ours.alongside(theirs).interval(lambda pair: np.exp(pair[..., 0] - pair[..., 1])),
        "dense_window_nll": tuple(windowed.nll.tolist()),
        "window_kl": tuple(windowed.kl.tolist()),
    }


def _warnings(handle: ModelHandle, against: ModelHandle | None, tokens: TokenScores, windows: WindowSet) -> tuple[str, ...]:
    nll, vocabulary = sample_of(tokens.nll, windows), handle.vocabulary
    result = window_warning(nll)
    if tokens.dense_nll is None:
        return result + uniform_warning(nll, vocabulary, name="the model", compared=False)
    dense = uniform_warning(sample_of(tokens.dense_nll, windows), vocabulary, name="the dense model", compared=True)
    return result + (dense or uniform_warning(nll, vocabulary, name="the compressed model", compared=False))


def _samples(tokens: TokenScores, windows: WindowSet) -> tuple[Sample, ...]:
    columns = (tokens.nll, tokens.dense_nll, tokens.kl, tokens.reverse_kl, tokens.top1_agreement, tokens.top5_agreement)
    return tuple(sample_of(column, windows) for column in columns if column is not None)


def _perplexity(nll: float) -> float:
    """Return exp(nll).

    Raises:
        NumericalError: it is too large for a float: the model diverged.
    """
    try:
        return math.exp(nll)
    except OverflowError as error:
        raise NumericalError(f"a mean loss of {nll:g} nats has no finite perplexity: the model diverged. Keep more ranks.") from error

"""Scoring windows of text: means over each window's tokens, or every token's own scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lowrank_core.errors import NumericalError
from lowrank_core.evaluation.passes import batches_of, logits_of
from lowrank_core.evaluation.reference import DenseReference
from lowrank_core.evaluation.tokens import TokenScores, compare_logits, joined
from lowrank_core.models.handle import ModelHandle
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress

__all__ = ["WindowScores", "score_tokens", "score_windows"]

_PASS_BYTES = 2**30
"""Of the logits of one model in one forward pass, unless a single window has more."""


@dataclass(frozen=True)
class WindowScores:
    """Means over the scored tokens of each window (windows,), divergences in nats; all but the NLL only next to a dense model."""

    nll: Tensor
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    top1_agreement: Tensor | None = None
    top5_agreement: Tensor | None = None

    @classmethod
    def of(cls, tokens: TokenScores, scored: Tensor | None = None) -> WindowScores:
        """Return the means of each window over the positions that ``scored`` (windows, T - 1) marks, or over all."""
        columns = {f.name: getattr(tokens, f.name) for f in fields(cls)}
        return cls(**{name: _means(column, scored).cpu() for name, column in columns.items() if column is not None})


def _means(column: Tensor, scored: Tensor | None) -> Tensor:
    if scored is None:
        return column.mean(1)
    return torch.where(scored, column, 0.0).sum(1) / scored.sum(1)


def score_windows(
    handle: ModelHandle,
    windows: WindowSet,
    *,
    batch_size: int = 8,
    dense: DenseReference | ModelHandle | None = None,
    autocast: bool = False,
    on_batch: Callable[[WindowScores], None] | None = None,
    progress: Progress | None = None,
) -> tuple[WindowScores, WindowScores | None]:
    """Return the scores of ``handle`` in every window, and those of ``dense`` where it is a model.

    A reference with entropies, or with the likeliest tokens alone, gives NLL and KL: a trial needs no more.

    Args:
        batch_size: windows in a forward pass; that of the reference, where one is given. Without a reference, a batch whose logits pass
            1 GiB goes through the model in several passes.
        autocast: run ``handle``, and never ``dense``, in bfloat16 where torch holds that to be safe; its logits are compared in float32.
        on_batch: is given the scores of every batch's windows, in order; what it raises ends the pass.

    Raises:
        ConfigError: the reference was computed on other batches.
        NumericalError: a window's loss or KL divergence is NaN or Inf; it is never skipped, nor given to ``on_batch``.
    """
    result, references = [], []
    for first, tokens in _scored_batches(handle, windows, batch_size, dense, autocast):
        done = first + len(tokens.nll)
        scored = None if windows.scored is None else windows.scored[first:done].to(tokens.nll.device)
        result.append(WindowScores.of(tokens, scored))
        if tokens.dense_nll is not None:
            references.append(WindowScores.of(TokenScores(tokens.dense_nll), scored))
        if on_batch is not None:
            on_batch(result[-1])
        if progress is not None:
            progress(done, windows.windows)
    return _joined(result), _joined(references) if references else None


def score_tokens(
    handle: ModelHandle,
    windows: WindowSet,
    *,
    batch_size: int = 8,
    dense: ModelHandle | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Return the scores of every token, in windows as they were given; positions that are not to be scored have theirs, too.

    Memory: two models' logits of one pass (at most 1 GiB each, or those of a single window), some ten float32 copies of a chunk of
    64 MiB, and 48 bytes for each token, at any batch size. Measured at 128k tokens of vocabulary, 2048 of context, 8 windows in a batch
    and float32: 2.3 GiB next to a dense model, 1.1 GiB alone; one copy of the batch's logits would be 7.8 GiB.

    Raises:
        NumericalError: a token's loss or divergence is NaN or Inf; its window is never skipped.
    """
    parts = []
    for first, tokens in _scored_batches(handle, windows, batch_size, dense, autocast=False):
        parts.append(tokens.cpu())
        if progress is not None:
            progress(first + len(tokens.nll), windows.windows)
    return joined(parts)


def _scored_batches(
    handle: ModelHandle, windows: WindowSet, batch_size: int, dense: DenseReference | ModelHandle | None, autocast: bool
) -> Iterator[tuple[int, TokenScores]]:
    """Yield the first window of every batch, and its tokens' scores."""
    if isinstance(dense, DenseReference):
        dense.check_batches(windows, batch_size)
    for index, (done, ids) in enumerate(batches_of(windows, batch_size, handle.device)):
        if isinstance(dense, DenseReference):
            tokens = dense.score(index, _logits(handle, ids, autocast).float(), ids)
        else:
            parts = torch.split(ids, _windows_in_pass(handle, windows.context))
            tokens = joined(compare_logits(_logits(handle, part, autocast), part, _beside(dense, part)) for part in parts)
        _check_finite(tokens, done - len(ids), windows)
        yield done - len(ids), tokens


def _logits(handle: ModelHandle, ids: Tensor, autocast: bool) -> Tensor:
    with torch.autocast(handle.device.type, torch.bfloat16, enabled=autocast):
        return logits_of(handle.module, ids)


def _beside(dense: ModelHandle | None, ids: Tensor) -> Tensor | None:
    return None if dense is None else logits_of(dense.module, ids.to(dense.device))


def _windows_in_pass(handle: ModelHandle, context: int) -> int:
    """Return how many windows' logits stay within the limit, in float32; at least one."""
    return max(1, _PASS_BYTES // (4 * context * handle.vocabulary))


def _check_finite(scores: TokenScores, first: int, windows: WindowSet) -> None:
    losses = sum(column for name, column in scores.columns.items() if not name.endswith("agreement"))
    assert isinstance(losses, Tensor)
    bad = torch.nonzero(~torch.isfinite(losses).all(1)).flatten().tolist()
    if bad:
        raise NumericalError(
            f"the loss of window {first + bad[0]} (of {windows.windows}) is not finite. "
            "The model diverged: keep more ranks, calibrate on more text, or run in float32."
        )


def _joined(parts: Iterable[WindowScores]) -> WindowScores:
    rows = list(parts)
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(WindowScores)}
    return WindowScores(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})

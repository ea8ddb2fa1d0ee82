"""Scores of single tokens, from logits.

Notation::

    z        logits (…, vocabulary);  q = softmax(z)
    p, q     next-token distributions of the dense and of the compressed model
    NLL      -log q(token), in nats
    KL       Σ p log(p / q);  reverse KL: Σ q log(q / p), in nats
    top-k    |A ∩ B| / k, where A and B are the k likeliest tokens by p and by q: a share in [0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["TokenScores", "compare_logits", "joined", "outcomes", "score_coarse", "score_logits", "score_probabilities"]

_FEW = 5
_CHUNK_BYTES = 64 * 2**20
"""Of one float32 copy of the logits while two models are compared; some ten of them are alive at once."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of every predicted token (windows, T - 1), float64; all but the NLL only next to a dense model.

    Attributes:
        nll: -log q(token), in nats.
        kl, reverse_kl: Σ p log(p / q) and Σ q log(q / p), in nats.
        top1_agreement: 1 where both models have the same likeliest token, else 0.
        top5_agreement: |A ∩ B| / 5 of the five likeliest tokens by p and by q (of the vocabulary, where it is smaller).
        dense_nll: -log p(token), in nats.
    """

    nll: Tensor
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    top1_agreement: Tensor | None = None
    top5_agreement: Tensor | None = None
    dense_nll: Tensor | None = None

    def cpu(self) -> TokenScores:
        return TokenScores(**{name: column.cpu() for name, column in self.columns.items()})

    @property
    def columns(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {f.name: column for f in fields(self) if (column := getattr(self, f.name)) is not None}


def joined(parts: Iterable[TokenScores], dim: int = 0) -> TokenScores:
    """Return the scores of all ``parts``, in order: of windows (0) or of positions (1)."""
    rows = [part.columns for part in parts]
    return TokenScores(**{name: torch.cat([row[name] for row in rows], dim) for name in rows[0]})


@torch.no_grad()
def compare_logits(logits: Tensor, ids: Tensor, dense: Tensor | None) -> TokenScores:
    """Score ``logits`` (B, T - 1, vocabulary) of any dtype, next to those of the dense model if given.

    It works on chunks of positions: beyond the logits given, it takes some ten float32 copies of a chunk, each of at most 64 MiB (or of
    one position of the B windows, if that is more).
    """
    batch, positions, vocabulary = logits.shape
    step = max(1, _CHUNK_BYTES // (4 * batch * vocabulary))
    return joined(
        (
            _compare_chunk(logits[:, start : start + step], ids[:, start : start + step + 1], _part(dense, start, step, logits.device))
            for start in range(0, positions, step)
        ),
        dim=1,
    )


def _part(dense: Tensor | None, start: int, step: int, device: torch.device) -> Tensor | None:
    return None if dense is None else dense[:, start : start + step].to(device)


def _compare_chunk(logits: Tensor, ids: Tensor, dense: Tensor | None) -> TokenScores:
    result = torch.log_softmax(logits.float(), dim=-1)
    if dense is None:
        return TokenScores(_nll(result, ids))
    other = torch.log_softmax(dense.float(), dim=-1)
    scores = score_probabilities(result, ids, other)
    return TokenScores(**{**scores.columns, "top5_agreement": _overlap(result, other), "dense_nll": _nll(other, ids)})


def _nll(result: Tensor, ids: Tensor) -> Tensor:
    return -result.gather(-1, ids[:, 1:, None]).squeeze(-1).double()


def _overlap(result: Tensor, dense: Tensor) -> Tensor:
    """Return the share of the likeliest tokens that both (…, vocabulary) have in common."""
    few = min(_FEW, result.shape[-1])
    ours, theirs = result.topk(few, dim=-1).indices, dense.topk(few, dim=-1).indices
    return (ours[..., :, None] == theirs[..., None, :]).any(-1).double().mean(-1)


@torch.no_grad()
def score_probabilities(result: Tensor, ids: Tensor, dense: Tensor) -> TokenScores:
    """Return NLL, KL both ways and top-1 agreement from log-probabilities (B, T - 1, vocabulary) of both models."""
    difference = dense - result
    return TokenScores(
        nll=_nll(result, ids),
        kl=(dense.exp() * difference).sum(-1).double(),
        reverse_kl=-(result.exp() * difference).sum(-1).double(),
        top1_agreement=(result.argmax(-1) == dense.argmax(-1)).double(),
    )


@torch.no_grad()
def score_logits(logits: Tensor, ids: Tensor, probabilities: Tensor, entropies: Tensor) -> TokenScores:
    """Return NLL and KL from the logits alone, without the log-probabilities of every token of the vocabulary."""
    total = torch.logsumexp(logits, dim=-1).double()
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).double()
    return TokenScores(total - chosen, total - torch.linalg.vecdot(probabilities, logits).double() + entropies)


@torch.no_grad()
def score_coarse(logits: Tensor, ids: Tensor, dense: Tensor, indices: Tensor) -> TokenScores:
    """Return NLL, and KL over k + 1 outcomes: ``dense`` (B, T - 1, k + 1) log-probabilities, the rest's last. It overwrites ``logits``."""
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).double()
    result = outcomes(logits, indices.long())
    total = result.logsumexp(-1)  # of k + 1, equal to that over the vocabulary: one pass over the logits gives both
    result, dense = result - total[..., None], dense.double()
    terms = torch.where(dense == -math.inf, 0.0, dense.exp() * (dense - result))
    return TokenScores(total - chosen, terms.sum(-1))


@torch.no_grad()
def outcomes(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the logits (…, k + 1) at ``indices`` (…, k) and, last, log Σ exp of all others; float64. It overwrites ``logits``.

    The others are summed by themselves: 1 - Σ of the k would cancel. A copy to strike the k out of would cost more than that sum.
    """
    kept = logits.gather(-1, indices)
    rest = logits.scatter_(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1).double()

"""Log-probabilities of the dense model, kept in memory for the trials of a search."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_core.errors import ConfigError, TextError
from lowrank_core.evaluation.intervals import Sample
from lowrank_core.evaluation.passes import batches_of, logits_of
from lowrank_core.evaluation.tokens import TokenScores, score_coarse, score_logits, score_probabilities
from lowrank_core.evaluation.tokens import outcomes as outcomes_of
from lowrank_core.evaluation.warnings import uniform_warning
from lowrank_core.models.handle import ModelHandle
from lowrank_core.text.windows import WindowSet
from lowrank_core.types import Progress
from lowrank_core.wording import amount

__all__ = ["DenseReference"]

_CACHE_LIMIT_BYTES = 6 * 2**30
_FEW_TOKENS = 128
"""Size of the vocabulary that the memory error suggests to keep."""


@dataclass(frozen=True)
class DenseReference:
    """Log-probabilities of the dense model on some windows, computed once for all trials.

    Attributes:
        batches: probabilities p (B, T - 1, vocabulary) where there are entropies, else log-probabilities; float32.
        entropies: Σ p log p of each token (B, T - 1), float64: with them KL = log Σ exp z - p·z + Σ p log p takes two passes over the
            logits z. None where the reverse KL divergence is wanted, too.
        indices: the k likeliest tokens (B, T - 1, k), int32, whose log-probabilities ``batches`` then holds (B, T - 1, k + 1), all the
            others together last: KL over these k + 1 outcomes is a lower bound of KL (by the log-sum inequality) that rises with k and
            is KL itself at the size of the vocabulary. Empty: every token is an outcome.
        nll: -log p(token), mean of each window (windows,), in nats.
        vocabulary: how many tokens there are.
    """

    batches: tuple[Tensor, ...]
    entropies: tuple[Tensor, ...] | None = None
    indices: tuple[Tensor, ...] = ()
    nll: Tensor | None = None
    vocabulary: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings on a dense model that predicts nothing: every comparison with it looks perfect."""
        if self.nll is None:
            return ()
        return uniform_warning(Sample(self.nll.numpy()), self.vocabulary, name="the dense model", compared=True)

    @classmethod
    def compute(
        cls,
        handle: ModelHandle,
        windows: WindowSet,
        *,
        batch_size: int,
        reverse: bool = False,
        top_k: int = 0,
        progress: Progress | None = None,
    ) -> DenseReference:
        """Run the dense model over ``windows``.

        Args:
            batch_size: windows in a forward pass, here and in every comparison.
            reverse: keep what the reverse KL divergence needs.
            top_k: keep the k likeliest tokens and the mass of all others: the memory of k tokens instead of the vocabulary's. 0 keeps
                every token; a k beyond the vocabulary is the vocabulary.

        Raises:
            ConfigError: the reverse KL divergence on some tokens alone, or a negative k.
            TextError: the probabilities would not fit in memory.
        """
        if top_k < 0:
            raise ConfigError(f"top-k must be at least 0, got {top_k}; 0 keeps every token.")
        if top_k and reverse:
            raise ConfigError("the reverse KL divergence needs every token's probability; leave top-k at 0, or choose the objective kl.")
        kept = min(top_k, handle.vocabulary)
        _check_fits(handle, windows, kept, reverse)
        batches, entropies, indices, losses = [], [], [], []
        for done, ids in batches_of(windows, batch_size, handle.device):
            logits = logits_of(handle.module, ids).float()
            losses.append((logits.logsumexp(-1) - logits.gather(-1, ids[:, 1:, None]).squeeze(-1)).double().mean(1).cpu())
            if kept:
                likeliest = logits.topk(kept, dim=-1).indices
                indices.append(likeliest.to(torch.int32))
                batches.append(torch.log_softmax(outcomes_of(logits, likeliest), dim=-1).float())
            elif reverse:
                batches.append(torch.log_softmax(logits, dim=-1))
            else:  # in float64: what a float32 softmax misses of Σ p = 1 would be multiplied by the logits, and bias KL
                probabilities = torch.softmax(logits.double(), dim=-1)
                entropies.append(-torch.special.entr(probabilities).sum(-1))
                batches.append(probabilities.float())
            if progress is not None:
                progress(done, windows.windows)
        vocabulary = handle.vocabulary
        return cls(tuple(batches), tuple(entropies) or None, tuple(indices), torch.cat(losses), vocabulary)

    def score(self, index: int, logits: Tensor, ids: Tensor) -> TokenScores:
        """Compare the ``index``-th batch with the float32 ``logits`` (B, T - 1, vocabulary), which may be overwritten."""
        if self.indices:
            return score_coarse(logits, ids, self.batches[index], self.indices[index])
        if self.entropies is not None:
            return score_logits(logits, ids, self.batches[index], self.entropies[index])
        return score_probabilities(torch.log_softmax(logits, dim=-1), ids, self.batches[index])

    def batch(self, index: int) -> DenseReference:
        """Return the ``index``-th batch alone."""
        own = slice(index, index + 1)
        entropies = None if self.entropies is None else self.entropies[own]
        return replace(self, batches=self.batches[own], entropies=entropies, indices=self.indices[own], nll=None)

    def check_batches(self, windows: WindowSet, batch_size: int) -> None:
        """Refuse other batches: a batch of one window would be compared with all of another.

        Raises:
            ConfigError: this was computed on other batches.
        """
        expected = [min(batch_size, windows.windows - start) for start in range(0, windows.windows, batch_size)]
        held = [len(batch) for batch in self.batches]
        if held != expected:
            raise ConfigError(
                f"the dense reference holds {sum(held)} windows, {max(held, default=0)} in a batch; asked for were {windows.windows} "
                f"in batches of {batch_size}. Compute it on the same windows, with the same batch_size."
            )


def _check_fits(handle: ModelHandle, windows: WindowSet, kept: int, reverse: bool) -> None:
    vocabulary = handle.vocabulary
    size = windows.windows * (windows.context - 1) * (8 * kept + 4 if kept else 4 * vocabulary)
    if size <= _CACHE_LIMIT_BYTES:
        return
    helps = not (reverse or 0 < kept <= _FEW_TOKENS)
    take = f"Keep the likeliest tokens alone (--top-k {_FEW_TOKENS}), or take" if helps else "Take"
    over = f"{kept} tokens of the vocabulary" if kept else "this vocabulary"
    raise TextError(
        f"{windows.windows} windows of {windows.context} tokens over {over} need {amount(size)} to compare with. "
        f"{take} fewer windows (--validation-windows; as published: --selected-windows), or lower --context "
        f"(the limit is {_CACHE_LIMIT_BYTES / 2**30:.0f} GiB)."
    )

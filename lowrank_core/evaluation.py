"""Measuring a model on windows of text: perplexity, and how far it is from the dense one.

Notation::

    p, q     next-token distributions of the dense and of the compressed model
    NLL      mean over all predicted tokens of -log q(token), in nats;  perplexity = exp(NLL)
    KL       mean over tokens of Σ p log(p / q);  reverse KL: Σ q log(q / p)
    stderr   standard error of the mean NLL, from the spread of window means
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_core.errors import ConfigError, ModelError, NumericalError, TextError
from lowrank_core.models.handle import ModelHandle
from lowrank_core.text.windows import WindowSet

__all__ = ["DenseReference", "EvaluationReport", "WindowScores", "evaluate", "score_windows"]

Progress = Callable[[int, int], None]

_CACHE_LIMIT_BYTES = 6 * 2**30
_BOOTSTRAP_SAMPLES = 2000
_FEW_TOKENS = 128
"""What the error about memory proposes to keep of the vocabulary."""


@dataclass(frozen=True)
class WindowScores:
    """Means over the predicted tokens of each window (windows,), in nats; the last three only beside a dense model."""

    nll: Tensor
    kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    top1_agreement: Tensor | None = None


@dataclass(frozen=True)
class DenseReference:
    """What the dense model predicts over some windows, computed once and compared with in every trial.

    Attributes:
        batches: probabilities p (B, T - 1, vocabulary) where there are entropies, else log-probabilities; float32.
        entropies: Σ p log p of each token (B, T - 1), float64: with them KL = log Σ exp z - p·z + Σ p log p takes two passes over the
            logits z. None where the reverse KL divergence is wanted, too.
        indices: the k likeliest tokens (B, T - 1, k), int32, whose log-probabilities ``batches`` then holds (B, T - 1, k + 1), all the
            others together last: KL over these k + 1 outcomes is a lower bound of KL (by the log-sum inequality) that rises with k and
            is KL itself at the size of the vocabulary. Empty: every token is an outcome.
    """

    batches: tuple[Tensor, ...]
    entropies: tuple[Tensor, ...] | None = None
    indices: tuple[Tensor, ...] = ()

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
        kept = min(top_k, int(handle.module.config.vocab_size))
        _check_fits(handle, windows, kept, reverse)
        batches, entropies, indices = [], [], []
        for done, ids in _batches(windows, batch_size, handle.device):
            logits = _logits(handle.module, ids)
            if kept:
                likeliest = logits.topk(kept, dim=-1).indices
                indices.append(likeliest.to(torch.int32))
                batches.append(torch.log_softmax(_outcomes(logits, likeliest), dim=-1).float())
            elif reverse:
                batches.append(torch.log_softmax(logits, dim=-1))
            else:  # in float64: what a float32 softmax misses of Σ p = 1 would be multiplied by the logits, and bias KL
                probabilities = torch.softmax(logits.double(), dim=-1)
                entropies.append(-torch.special.entr(probabilities).sum(-1))
                batches.append(probabilities.float())
            if progress is not None:
                progress(done, windows.windows)
        return cls(tuple(batches), tuple(entropies) or None, tuple(indices))


def _check_fits(handle: ModelHandle, windows: WindowSet, kept: int, reverse: bool) -> None:
    vocabulary = int(handle.module.config.vocab_size)
    size = windows.predicted_tokens * (8 * kept + 4 if kept else 4 * vocabulary)
    if size <= _CACHE_LIMIT_BYTES:
        return
    helps = not (reverse or 0 < kept <= _FEW_TOKENS)
    take = f"Keep the likeliest tokens alone (--top-k {_FEW_TOKENS}), or take" if helps else "Take"
    over = f"{kept} tokens of the vocabulary" if kept else "this vocabulary"
    raise TextError(
        f"{windows.windows} windows of {windows.context} tokens over {over} need {size / 2**30:.1f} GiB to compare with. "
        f"{take} fewer windows (--validation-windows), or lower --context (the limit is {_CACHE_LIMIT_BYTES / 2**30:.0f} GiB)."
    )


@torch.no_grad()
def _outcomes(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the logits (…, k + 1) at ``indices`` (…, k) and, last, log Σ exp of all others; float64. It overwrites ``logits``.

    The others are summed by themselves: 1 - Σ of the k would cancel. A copy to strike the k out of would cost more than that sum.
    """
    kept = logits.gather(-1, indices)
    rest = logits.scatter_(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1).double()


def _batches(windows: WindowSet, batch_size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, windows.windows, batch_size):
        ids = windows.ids[start : start + batch_size]
        yield start + len(ids), ids.to(device)


@torch.no_grad()
def _log_probabilities(module: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return (B, T - 1, vocabulary) float32 log-probabilities of the tokens after the first."""
    return torch.log_softmax(_logits(module, ids), dim=-1)


@torch.no_grad()
def _logits(module: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = module(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.float()


@torch.no_grad()
def _score_logits(logits: Tensor, ids: Tensor, probabilities: Tensor, entropies: Tensor) -> WindowScores:
    """Return NLL and KL from the logits alone, without the log-probabilities of every token of the vocabulary."""
    total = torch.logsumexp(logits, dim=-1).double()
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).double()
    kl = total - torch.linalg.vecdot(probabilities, logits).double() + entropies
    return WindowScores((total - chosen).mean(1).cpu(), kl.mean(1).cpu())


@torch.no_grad()
def _score_coarse(logits: Tensor, ids: Tensor, dense: Tensor, indices: Tensor) -> WindowScores:
    """Return NLL, and KL over k + 1 outcomes: ``dense`` (B, T - 1, k + 1) log-probabilities, the rest's last. It overwrites ``logits``."""
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).double()
    outcomes = _outcomes(logits, indices.long())
    total = outcomes.logsumexp(-1)  # of k + 1, equal to that over the vocabulary: one pass over the logits gives both
    found, dense = outcomes - total[..., None], dense.double()
    terms = torch.where(dense == -math.inf, 0.0, dense.exp() * (dense - found))
    return WindowScores((total - chosen).mean(1).cpu(), terms.sum(-1).mean(1).cpu())


@torch.no_grad()
def _score_batch(found: Tensor, ids: Tensor, dense: Tensor | None) -> WindowScores:
    nll = -found.gather(-1, ids[:, 1:, None]).squeeze(-1).double().mean(1)
    if dense is None:
        return WindowScores(nll.cpu())
    difference = dense - found
    kl = (dense.exp() * difference).sum(-1).double().mean(1)
    reverse = -(found.exp() * difference).sum(-1).double().mean(1)
    agreement = (found.argmax(-1) == dense.argmax(-1)).double().mean(1)
    return WindowScores(nll.cpu(), kl.cpu(), reverse.cpu(), agreement.cpu())


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
        batch_size: windows in a forward pass; that of the reference, where one is given.
        autocast: run ``handle``, and never ``dense``, in bfloat16 where torch holds that to be safe; its logits are compared in float32.
        on_batch: is given the scores of every batch's windows, in order; what it raises ends the pass.

    Raises:
        ConfigError: the reference was computed on other batches.
        NumericalError: a window's loss or KL divergence is NaN or Inf; it is never skipped, nor given to ``on_batch``.
    """
    if isinstance(dense, DenseReference):
        _check_batches(dense, windows, batch_size)
    found, references = [], []
    for index, (done, ids) in enumerate(_batches(windows, batch_size, handle.device)):
        other: Tensor | None = None
        if isinstance(dense, ModelHandle):
            other = _log_probabilities(dense.module, ids.to(dense.device)).to(handle.device)
            references.append(_score_batch(other, ids, None))
        with torch.autocast(handle.device.type, torch.bfloat16, enabled=autocast):
            logits = _logits(handle.module, ids)
        if isinstance(dense, DenseReference):
            found.append(_score_beside(dense, index, logits, ids))
        else:
            found.append(_score_batch(torch.log_softmax(logits, dim=-1), ids, other))
        _check_finite(found[-1], done - len(ids), windows)
        if on_batch is not None:
            on_batch(found[-1])
        if progress is not None:
            progress(done, windows.windows)
    return _joined(found), _joined(references) if references else None


def _score_beside(dense: DenseReference, index: int, logits: Tensor, ids: Tensor) -> WindowScores:
    if dense.indices:
        return _score_coarse(logits, ids, dense.batches[index], dense.indices[index])
    if dense.entropies is not None:
        return _score_logits(logits, ids, dense.batches[index], dense.entropies[index])
    return _score_batch(torch.log_softmax(logits, dim=-1), ids, dense.batches[index])


def _check_batches(dense: DenseReference, windows: WindowSet, batch_size: int) -> None:
    """Refuse a reference of other batches: a batch of one window would be compared with all of another."""
    expected = [min(batch_size, windows.windows - start) for start in range(0, windows.windows, batch_size)]
    held = [len(batch) for batch in dense.batches]
    if held != expected:
        raise ConfigError(
            f"the dense reference holds {sum(held)} windows, {max(held, default=0)} in a batch; asked for were {windows.windows} "
            f"in batches of {batch_size}. Compute it on the same windows, with the same batch_size."
        )


def _check_finite(scores: WindowScores, first: int, windows: WindowSet) -> None:
    losses = scores.nll if scores.kl is None else scores.nll + scores.kl
    bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if bad:
        raise NumericalError(
            f"the loss of window {first + bad[0]} (of {windows.windows}) is not finite. "
            "The model diverged: keep more ranks, calibrate on more text, or run in float32."
        )


def _joined(parts: Iterable[WindowScores]) -> WindowScores:
    rows = list(parts)
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(WindowScores)}
    joined = {name: torch.cat(column) for name, column in columns.items() if column[0] is not None}
    return WindowScores(**joined)


@dataclass(frozen=True)
class EvaluationReport:
    """Figures of one model on one set of windows, with the protocol that they need.

    ``perplexity_interval`` is the 95 % bootstrap interval over windows; ``perplexity_difference_interval`` that of the
    difference to the dense model on the same windows (paired), and ``kl_interval`` that of the KL divergence.
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
    perplexity_interval: tuple[float, float]
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

    def to_mapping(self) -> dict[str, object]:
        """Return the report ready for JSON, without the figures beside a dense model if there was none."""
        beside = {f.name for f in fields(self) if f.default is None}
        return {name: value for name, value in asdict(self).items() if value is not None or name not in beside}


def evaluate(
    handle: ModelHandle, windows: WindowSet, *, against: ModelHandle | None = None, batch_size: int = 8, progress: Progress | None = None
) -> EvaluationReport:
    """Measure ``handle`` on ``windows``, beside the dense model ``against`` if given.

    Raises:
        NumericalError: a window's loss is not finite.
        ModelError: the windows do not fit the model, or the two models do not share a vocabulary.
    """
    handle.check_tokens(windows.ids)
    began = time.perf_counter()
    scores, dense = _scored(handle, windows, against, batch_size, progress)
    nll = scores.nll.numpy()
    return EvaluationReport(
        dataset=windows.dataset,
        split=windows.split,
        context=windows.context,
        windows=windows.windows,
        tokens=windows.predicted_tokens,
        bos="window" if windows.bos else "none",
        protocol=windows.protocol,
        perplexity=_perplexity(float(nll.mean())),
        nll=float(nll.mean()),
        nll_stderr=float(nll.std(ddof=1) / math.sqrt(len(nll))) if len(nll) > 1 else None,
        perplexity_interval=_bootstrap(np.exp, nll),
        parameters=handle.parameters,
        compressible_parameters=handle.linear_parameters,
        bytes=handle.bytes,
        seconds=time.perf_counter() - began,
        window_nll=tuple(nll.tolist()),
        **_beside_dense(handle, scores, against, dense),  # type: ignore[arg-type]
    )


def _scored(
    handle: ModelHandle, windows: WindowSet, against: ModelHandle | None, batch_size: int, progress: Progress | None
) -> tuple[WindowScores, WindowScores | None]:
    if against is None:
        return score_windows(handle, windows, batch_size=batch_size, progress=progress)
    ours, theirs = int(handle.module.config.vocab_size), int(against.module.config.vocab_size)
    if ours != theirs or handle.tokenizer.get_vocab() != against.tokenizer.get_vocab():
        raise ModelError(
            f"{handle.reference} and {against.reference} have different vocabularies; compare a model with the one that it was made from."
        )
    return score_windows(handle, windows, batch_size=batch_size, dense=against, progress=progress)


def _beside_dense(handle: ModelHandle, scores: WindowScores, against: ModelHandle | None, dense: WindowScores | None) -> dict[str, object]:
    if against is None or dense is None:
        return {}
    assert scores.kl is not None
    assert scores.top1_agreement is not None
    ours, theirs = scores.nll.numpy(), dense.nll.numpy()
    return {
        "dense_perplexity": _perplexity(float(theirs.mean())),
        "dense_nll": float(theirs.mean()),
        "dense_perplexity_interval": _bootstrap(np.exp, theirs),
        "dense_parameters": against.parameters,
        "dense_compressible_parameters": against.linear_parameters,
        "dense_bytes": against.bytes,
        "compression_ratio": 1 - handle.linear_parameters / against.linear_parameters,
        "model_compression_ratio": 1 - handle.parameters / against.parameters,
        "kl": float(scores.kl.mean()),
        "kl_interval": _bootstrap(lambda mean: mean, scores.kl.numpy()),
        "top1_agreement": float(scores.top1_agreement.mean()),
        "perplexity_difference_interval": _bootstrap(
            lambda pair: np.exp(pair[..., 0]) - np.exp(pair[..., 1]), np.stack([ours, theirs], axis=-1)
        ),
        "dense_window_nll": tuple(theirs.tolist()),
    }


def _perplexity(nll: float) -> float:
    """Return exp(nll).

    Raises:
        NumericalError: it is too large for a float: the model diverged.
    """
    try:
        return math.exp(nll)
    except OverflowError as error:
        raise NumericalError(f"a mean loss of {nll:g} nats has no finite perplexity: the model diverged. Keep more ranks.") from error


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of ``statistic`` of the mean row, resampling rows (windows)."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(rows), size=(_BOOTSTRAP_SAMPLES, len(rows)))
    low, high = np.quantile(statistic(rows[drawn].mean(axis=1)), [0.025, 0.975])
    return float(low), float(high)

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
            others together last: a lower bound of KL (by the log-sum inequality) that rises with k. Empty: the whole vocabulary.
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
            reverse: keep what the reverse KL divergence needs.
            top_k: keep the k likeliest tokens alone; 0 keeps all.

        Raises:
            ConfigError: the reverse KL divergence on some tokens alone.
            TextError: the probabilities would not fit in memory.
        """
        if top_k and reverse:
            raise ConfigError("the reverse KL divergence needs every token's probability; leave top-k at 0.")
        vocabulary = int(handle.module.config.vocab_size)
        kept = min(top_k, vocabulary)
        size = windows.predicted_tokens * (8 * kept + 4 if kept else 4 * vocabulary)
        if size > _CACHE_LIMIT_BYTES:
            gib = size / 2**30
            raise TextError(
                f"{windows.windows} windows of {windows.context} tokens over this vocabulary need {gib:.1f} GiB to compare with. "
                "Keep the likeliest tokens alone (--top-k 128), lower --context, or take fewer windows "
                f"(the limit is {_CACHE_LIMIT_BYTES / 2**30:.0f} GiB)."
            )
        batches, entropies, indices = [], [], []
        for done, ids in _batches(windows, batch_size, handle.device):
            found = _log_probabilities(handle.module, ids)
            if kept:
                likeliest = found.topk(kept, dim=-1).indices
                indices.append(likeliest.to(torch.int32))
                found = _coarse(found, likeliest)
            elif not reverse:
                probabilities = found.exp()
                entropies.append(-torch.special.entr(probabilities.double()).sum(-1))
                found = probabilities
            batches.append(found)
            if progress is not None:
                progress(done, windows.windows)
        return cls(tuple(batches), tuple(entropies) or None, tuple(indices))


@torch.no_grad()
def _coarse(values: Tensor, indices: Tensor) -> Tensor:
    """Return logits or log-probabilities (…, k + 1): those at ``indices`` (…, k), and the logarithm of all others' sum.

    The others are summed by themselves: 1 - Σ of the k would cancel.
    """
    rest = values.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([values.gather(-1, indices), rest], dim=-1)


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
    """Return NLL, and KL over k + 1 outcomes: ``dense`` (B, T - 1, k + 1) log-probabilities, the rest's last."""
    total = torch.logsumexp(logits, dim=-1).double()
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).double()
    found = _coarse(logits, indices.long()).double() - total[..., None]
    dense = dense.double()
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
        autocast: run ``handle`` in bfloat16 where torch holds that to be safe; its logits are compared in float32.
        on_batch: is given the scores of every batch, in order; what it raises ends the pass.

    Raises:
        NumericalError: a window's loss is NaN or Inf; it is never skipped.
    """
    found, references = [], []
    for index, (done, ids) in enumerate(_batches(windows, batch_size, handle.device)):
        if isinstance(dense, ModelHandle):
            other = _log_probabilities(dense.module, ids.to(dense.device)).to(handle.device)
            references.append(_score_batch(other, ids, None))
            found.append(_score_batch(_log_probabilities(handle.module, ids), ids, other))
        else:
            with torch.autocast(handle.device.type, torch.bfloat16, enabled=autocast):
                logits = _logits(handle.module, ids)
            found.append(_score(logits, ids, dense, index))
        _check_finite(found[-1], done - len(ids), windows)
        if on_batch is not None:
            on_batch(found[-1])
        if progress is not None:
            progress(done, windows.windows)
    return _joined(found), _joined(references) if references else None


def _score(logits: Tensor, ids: Tensor, dense: DenseReference | None, index: int) -> WindowScores:
    if dense is not None and dense.indices:
        return _score_coarse(logits, ids, dense.batches[index], dense.indices[index])
    if dense is not None and dense.entropies is not None:
        return _score_logits(logits, ids, dense.batches[index], dense.entropies[index])
    return _score_batch(torch.log_softmax(logits, dim=-1), ids, None if dense is None else dense.batches[index])


def _check_finite(scores: WindowScores, first: int, windows: WindowSet) -> None:
    bad = torch.nonzero(~torch.isfinite(scores.nll)).flatten().tolist()
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

"""Cutting a text into contiguous windows of tokens.

Without a stride windows do not overlap, and each one's tokens are predicted but its first. With a stride of s tokens a window begins s
tokens after the one before, and only its last s tokens are scored, each after at least the others of its context; the first window
is scored entirely. So every token of the text but the very first is predicted exactly once. Where BOS goes first in every window, it
takes one place of the context and is never predicted; the very first token then is, too. In both cases the end of the text that
fills no window (no stride) is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_core.config import TextConfig
from lowrank_core.errors import ConfigError, TextError
from lowrank_core.text.sources import SPLITS, TextDocuments, open_text

__all__ = ["TokenWindows", "WindowSet", "load_text", "load_windows"]

_PREVIEW_CHARACTERS = 600


@dataclass(frozen=True)
class WindowSet:
    """Windows of one split.

    Attributes:
        dataset: name of the text.
        split: calibration, validation, test or all.
        ids: (windows, context) int64 tokens.
        bos: whether each window begins with BOS.
        available_tokens: tokens that the split has in all.
        stride: tokens from one window to the next; None where windows do not overlap.
        scored: (windows, context - 1), which of the tokens after the first count; None where all do.
        selection: how they were selected among others, in words; empty where they are spread over the split or drawn.
    """

    dataset: str
    split: str
    ids: Tensor
    bos: bool
    available_tokens: int
    stride: int | None = None
    scored: Tensor | None = None
    selection: str = ""

    @property
    def windows(self) -> int:
        return self.ids.shape[0]

    @property
    def context(self) -> int:
        return self.ids.shape[1]

    @property
    def predicted_tokens(self) -> int:
        """Tokens whose probability counts: all but each window's first, unless windows overlap."""
        return self.windows * (self.context - 1) if self.scored is None else int(self.scored.sum())

    def first(self, windows: int) -> WindowSet:
        """Return at most the first ``windows`` of them; calibration windows are in a random order."""
        return self.part(0, windows)

    def part(self, start: int, stop: int) -> WindowSet:
        """Return the windows from ``start`` to ``stop``."""
        return replace(self, ids=self.ids[start:stop], scored=None if self.scored is None else self.scored[start:stop])

    @property
    def sha256(self) -> str:
        """Hash of the tokens: two sets with equal hashes are the same text."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    @property
    def protocol(self) -> str:
        """One line that a figure must carry."""
        bos = "BOS first in every window" if self.bos else "no BOS"
        kind, once = ("non-overlapping", "") if self.stride is None else ("overlapping", " once")
        stride = "" if self.stride is None else f", stride {self.stride}"
        selection = f", {self.selection}" if self.selection else ""
        return (
            f"{self.dataset}, {self.split} split: {self.windows} {kind} windows of {self.context} tokens{stride}, "
            f"{self.predicted_tokens} tokens predicted{once}, {bos}{selection}"
        )


@dataclass(frozen=True)
class TokenWindows:
    """The three disjoint window sets of a text, and its first characters."""

    calibration: WindowSet
    validation: WindowSet
    test: WindowSet
    preview: str

    def describe(self, seed: int) -> dict[str, object]:
        """Return what a page shows of the text, ready for JSON."""
        sets = {split: getattr(self, split) for split in SPLITS}
        return {
            "reference": self.calibration.dataset,
            "context": self.calibration.context,
            "bos": "window" if self.calibration.bos else "none",
            "seed": seed,
            "preview": self.preview,
            "splits": {
                split: {
                    "windows": windows.windows,
                    "tokens": windows.ids.numel(),
                    "available_tokens": windows.available_tokens,
                    "sha256": windows.sha256,
                }
                for split, windows in sets.items()
            },
        }


def load_text(config: TextConfig, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
    """Return the calibration, validation and test windows of a text.

    Calibration windows are drawn at random with ``config.seed``; the others are spread evenly over their split.

    Raises:
        TextError: the text can't be read, or a split is shorter than one window.
    """
    source = open_text(config.reference)
    counts = dict(zip(SPLITS, (config.calibration_windows, config.validation_windows, config.test_windows), strict=True))
    sets = {split: _windows(source, config, tokenizer, _Cut(split, count)) for split, count in counts.items()}
    return TokenWindows(**sets, preview=source.text("calibration")[:_PREVIEW_CHARACTERS])


def load_windows(
    config: TextConfig, tokenizer: PreTrainedTokenizerBase, split: str, *, count: int | None = None, stride: int | None = None
) -> WindowSet:
    """Return windows of one split (or ``all``), every one that fits unless ``count`` is given.

    Args:
        stride: tokens from one window to the next, at most those of text that a window holds; None: windows do not overlap. Fewer
            windows than there are stay spread over the split: then some of its tokens are predicted once, and the others not at all.

    Raises:
        ConfigError: the stride is out of range.
        TextError: as ``load_text``.
    """
    return _windows(open_text(config.reference), config, tokenizer, _Cut(split, count, stride))


@dataclass(frozen=True)
class _Cut:
    """Windows to take from a text."""

    split: str
    count: int | None = None
    stride: int | None = None


def _windows(source: TextDocuments, config: TextConfig, tokenizer: PreTrainedTokenizerBase, cut: _Cut) -> WindowSet:
    bos = _begins_with_bos(config.bos, tokenizer)
    body = config.context - bos
    if cut.stride is not None:
        _check_stride(cut.stride, body, config.context)
    step = cut.stride or body
    tokens = np.asarray(tokenizer(source.text(cut.split), add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    if len(tokens) < body:
        raise TextError(
            f"text: the {cut.split} split of {source.name} has {len(tokens)} tokens, fewer than one window of {config.context}. "
            "Give a longer text, or a shorter context."
        )
    available = (len(tokens) - body) // step + 1
    chosen = np.asarray(_choose(available, cut.count, config.seed if cut.split == "calibration" else None))
    ids = np.lib.stride_tricks.sliding_window_view(tokens, body)[chosen * step]
    if bos:
        ids = np.concatenate([np.full((len(ids), 1), tokenizer.bos_token_id, dtype=np.int64), ids], axis=1)
    scored = None if cut.stride is None else _last_of_each(torch.from_numpy(chosen), config.context, cut.stride)
    return WindowSet(source.name, cut.split, torch.from_numpy(np.ascontiguousarray(ids)), bos, len(tokens), cut.stride, scored)


def _check_stride(stride: int, body: int, context: int) -> None:
    if not 1 <= stride <= body:
        held = f"a window of {context} tokens holds {body} of text" + (" after BOS" if body < context else "")
        raise ConfigError(
            f"stride must be at least 1 and at most {body}, or tokens would be left out ({held}); got {stride}. "
            f"Try --stride {max(1, context // 2)}, or leave it out for windows that do not overlap."
        )


def _last_of_each(chosen: Tensor, context: int, stride: int) -> Tensor:
    """Return which positions (windows, context - 1) count: the last ``stride`` of each window, and all of the text's first one."""
    last = torch.arange(context - 1) >= context - 1 - stride
    return last[None, :] | (chosen == 0)[:, None]


def _choose(available: int, count: int | None, seed: int | None) -> Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]:
    if count is None or count >= available:
        return range(available)
    if seed is not None:
        return np.random.default_rng(seed).choice(available, count, replace=False)
    return np.linspace(0, available - 1, count).round().astype(np.int64)


def _begins_with_bos(rule: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    if rule == "none":
        return False
    if tokenizer.bos_token_id is None:
        if rule == "window":
            raise TextError("text: this tokenizer has no BOS token. Use --bos none.")
        return False
    return rule == "window" or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

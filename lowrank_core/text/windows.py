"""Cutting a text into contiguous windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_core.config import TextConfig
from lowrank_core.errors import TextError
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
    """

    dataset: str
    split: str
    ids: Tensor
    bos: bool
    available_tokens: int

    @property
    def windows(self) -> int:
        return self.ids.shape[0]

    @property
    def context(self) -> int:
        return self.ids.shape[1]

    @property
    def predicted_tokens(self) -> int:
        """Tokens that get a probability: all but each window's first."""
        return self.windows * (self.context - 1)

    def first(self, windows: int) -> WindowSet:
        """Return at most the first ``windows`` of them; calibration windows are in a random order."""
        return replace(self, ids=self.ids[:windows])

    @property
    def sha256(self) -> str:
        """Hash of the tokens: two sets with equal hashes are the same text."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    @property
    def protocol(self) -> str:
        """One line that a figure must carry."""
        bos = "BOS first in every window" if self.bos else "no BOS"
        return (
            f"{self.dataset}, {self.split} split: {self.windows} non-overlapping windows of {self.context} tokens, "
            f"{self.predicted_tokens} tokens predicted, {bos}"
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
    sets = {split: _windows(source, config, tokenizer, split, count) for split, count in counts.items()}
    return TokenWindows(**sets, preview=source.text("calibration")[:_PREVIEW_CHARACTERS])


def load_windows(config: TextConfig, tokenizer: PreTrainedTokenizerBase, split: str, *, count: int | None = None) -> WindowSet:
    """Return windows of one split (or ``all``), every one that fits unless ``count`` is given.

    Raises:
        TextError: as ``load_text``.
    """
    return _windows(open_text(config.reference), config, tokenizer, split, count)


def _windows(source: TextDocuments, config: TextConfig, tokenizer: PreTrainedTokenizerBase, split: str, count: int | None) -> WindowSet:
    tokens = tokenizer(source.text(split), add_special_tokens=False, verbose=False)["input_ids"]
    bos = _begins_with_bos(config.bos, tokenizer)
    body = config.context - bos
    available = len(tokens) // body
    if available == 0:
        raise TextError(
            f"text: the {split} split of {source.name} has {len(tokens)} tokens, fewer than one window of {config.context}. "
            "Give a longer text, or a shorter context."
        )
    chosen = _choose(available, count, config.seed if split == "calibration" else None)
    stream = np.asarray(tokens[: available * body], dtype=np.int64).reshape(available, body)[chosen]
    if bos:
        stream = np.concatenate([np.full((len(stream), 1), tokenizer.bos_token_id, dtype=np.int64), stream], axis=1)
    return WindowSet(source.name, split, torch.from_numpy(np.ascontiguousarray(stream)), bos, len(tokens))


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

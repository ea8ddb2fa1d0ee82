"""Forward passes over windows of text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_core.text.windows import WindowSet

__all__ = ["batches_of", "logits_of"]


def batches_of(windows: WindowSet, batch_size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield the windows done after a batch, and its tokens (B, T)."""
    for start in range(0, windows.windows, batch_size):
        ids = windows.ids[start : start + batch_size]
        yield start + len(ids), ids.to(device)


@torch.no_grad()
def logits_of(module: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits (B, T - 1, vocabulary) of the tokens after the first, in the model's dtype."""
    logits: Tensor = module(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits

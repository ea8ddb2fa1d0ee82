"""The dtype that a model is written in: its weights and its outputs must be finite in it.

Weights that fit into float16 need not give finite outputs: activations overflow at 65,504, which models trained in bfloat16 pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_core.config import ExportConfig
from lowrank_core.errors import NumericalError
from lowrank_core.models import ModelHandle
from lowrank_core.models.handle import random_tokens
from lowrank_core.models.mapped import all_finite, converted
from lowrank_core.text import WindowSet

__all__ = ["check_finite", "check_precision", "written_dtype"]

_FLAGS = "--dtype of `lowrank export`, --export-dtype of other commands, Dtype on the Export page"


def written_dtype(handle: ModelHandle, config: ExportConfig) -> torch.dtype:
    """Return the dtype that ``config`` asks for: that of the checkpoint, if it says no other."""
    chosen: torch.dtype = handle.stored_dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return chosen


def check_precision(handle: ModelHandle, config: ExportConfig, windows: WindowSet | None) -> None:
    """Check, before work is spent, that a model runs in the dtype that what is made of it will be written in.

    Only a dtype of a smaller range than the one that it is held in is tried, on a copy.

    Raises:
        NumericalError: its weights or outputs overflow.
    """
    dtype = written_dtype(handle, config)
    if torch.finfo(dtype).max < torch.finfo(handle.module.dtype).max:
        check_finite(converted(handle.module, dtype, handle.weights), windows)


def check_finite(module: PreTrainedModel, windows: WindowSet | None) -> None:
    """Check the weights of a model, and its logits of one window (random tokens without one), in the dtype that it has.

    Raises:
        NumericalError: some are not finite; says which dtypes to give instead.
    """
    dtype = str(module.dtype).removeprefix("torch.")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NumericalError(f"{name}: its values overflow in {tensor.dtype}. Write bfloat16 or float32 ({_FLAGS}).")
    ids = random_tokens(module, 1) if windows is None else windows.ids[:1].to(module.device)
    if not torch.isfinite(_logits(module, ids)).all():
        others = " or ".join(name for name in ("bfloat16", "float32") if name != dtype)
        raise NumericalError(
            f"the model gives NaN or Inf in {dtype}, the dtype that it would be written in: its activations overflow. "
            f"Write {others} ({_FLAGS})."
        )


@torch.no_grad()
def _logits(module: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return logits (1, T, vocabulary) of a model that is in eval mode; it is left as it is."""
    logits: Tensor = module(input_ids=ids, use_cache=False).logits
    return logits

"""Guard tensors that make a folder of factors fail loudly without our package.

transformers skips a format that it does not know, builds the plain class, and leaves its linear layers at random without an error. It
does refuse a tensor of another shape than its parameter. So each compressed layer has an empty tensor in the file, under the name of
the dense weight that it replaces: no numbers, no bytes of data. Our quantizer replaces that layer first, and passes over the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_core.files.weights import guard_name, without_guard

__all__ = ["guard_name", "guard_pattern", "guards", "unguarded"]


def guards(layers: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return name -> an empty (0,) tensor for each compressed layer; in the dtype of the others, as readers infer theirs from any."""
    return {guard_name(layer): torch.empty(0, dtype=dtype) for layer in layers}


def guard_pattern(layers: Iterable[str]) -> str:
    """Return a regular expression that matches the guards of ``layers`` alone."""
    return rf"^({'|'.join(re.escape(guard_name(layer)) for layer in layers)})$"


def unguarded(layers: Iterable[str], files: Sequence[Path]) -> list[str]:
    """Return the layers that no tensor in the headers of ``files`` guards."""
    empty: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as archive:
            empty |= {key for key in archive.keys() if archive.get_slice(key).get_shape() == [0]}  # noqa: SIM118  (no mapping)
    return without_guard(layers, empty)

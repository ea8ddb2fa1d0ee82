"""Guard tensors that make a folder of factors fail loudly without our package.

transformers skips a format that it does not know, builds the plain class, and leaves its linear layers at random without an error. It
does refuse a tensor of another shape than its parameter. So each compressed layer has an empty tensor in the file, under the name of
the dense weight that it replaces: no numbers, no bytes of data. Our quantizer replaces that layer first, and passes over the name.
The layers of experts, or of a fused projection, replace a parameter that they share; their entries in ``config.json`` name it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_core.files.weights import guard_name, without_guard

__all__ = ["guard_name", "guard_pattern", "guards", "unguarded"]


Layers = Mapping[str, Mapping[str, object]]
"""Dotted path of a compressed layer -> its entry in ``config.json``."""


def guards(names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return name -> an empty (0,) tensor for each guard; in the dtype of the others, as readers infer theirs from any."""
    return {name: torch.empty(0, dtype=dtype) for name in names}


def guard_pattern(layers: Layers) -> str:
    """Return a regular expression that matches the guards of ``layers`` alone."""
    names = dict.fromkeys(guard_name(layer, entry) for layer, entry in layers.items())
    return rf"^({'|'.join(map(re.escape, names))})$"


def unguarded(layers: Layers, files: Sequence[Path]) -> list[str]:
    """Return the names of the guards of ``layers`` that no tensor in the headers of ``files`` is."""
    empty: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as archive:
            empty |= {key for key in archive.keys() if archive.get_slice(key).get_shape() == [0]}  # noqa: SIM118  (no mapping)
    return without_guard(layers, empty)

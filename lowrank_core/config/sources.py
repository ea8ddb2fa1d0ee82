"""Sources of model and text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_core.config.options import check_options, option
from lowrank_core.errors import ConfigError

__all__ = ["BOS_RULES", "DTYPES", "WORKING_SHARE", "ModelSource", "TextConfig", "looks_like_path"]

DTYPES = ("auto", "float32", "bfloat16")
BOS_RULES = ("auto", "window", "none")


WORKING_SHARE = 2.5
"""Weights are held in memory that is this many times as large at least, as compressing them takes at most; else they stay on disk."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class ModelSource:
    """Source of a causal language model, its dtype and device, and the memory that may be taken."""

    reference: str = option(
        "demo",
        "demo (the bundled model), a local folder, a GGUF file, or a hub id",
        label="Model",
        flag="model",
        fallback="none; give it here or in --config",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", label="Device")
    dtype: str = option(
        "auto",
        "auto: float32 on a CPU, as stored on a GPU; bfloat16 halves the memory and rounds what is measured",
        label="Weights held as",
        choices=DTYPES,
    )
    memory: str = option(
        "auto",
        "what a process may take, such as 4GB: weights that leave too little of it stay on disk and are read block by block, which is "
        "slower and changes no number; auto: what is free",
        label="Memory",
    )

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ConfigError("model: give `demo`, a local folder, a GGUF file, or a hub id.")
        check_options(self)
        _ = self.memory_bytes

    @property
    def memory_bytes(self) -> int | None:
        """Bytes that a process may take; None where that is what is free.

        Raises:
            ConfigError: it is no size.
        """
        if self.memory == "auto":
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B)", self.memory.strip().upper())
        if found is None or not float(found[1]):
            raise ConfigError(f"memory: {self.memory!r} is no size. Give one such as 800MB or 4GB, or auto.")
        return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True)
class TextConfig:
    """Source of a text, and its windows."""

    reference: str = option(
        "python-stdlib",
        "python-stdlib, file:PATH (.txt, .jsonl, .parquet), wikitext-2, c4, ptb, or NAME:FOLDER for a local copy of those",
        label="Text",
        flag="text",
        fallback="none; give it here or in --config",
    )
    context: int = option(
        256, "tokens in a window, BOS included; at most what the model takes", label="Context (tokens in a window)", minimum=2, step=64
    )
    calibration_windows: int = option(
        256,
        "windows that statistics are measured on, drawn at random; more of them: steadier small eigenvalues, longer calibration",
        label="Calibration windows",
        minimum=1,
        step=32,
    )
    validation_windows: int = option(
        24, "windows that a search sees in each trial, evenly spaced over the split", label="Search-validation windows", minimum=1
    )
    test_windows: int = option(
        128, "windows that final numbers are measured on, evenly spaced over the split", label="Test windows", minimum=1
    )
    bos: str = option("auto", "window: first in every window; none: nowhere; auto: as the tokenizer does", label="BOS", choices=BOS_RULES)
    seed: int = option(0, "of the draw of calibration windows, and of a search's sampler unless it has its own", label="Seed", minimum=0)

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ConfigError("text: give `python-stdlib`, `file:PATH`, `wikitext-2`, `c4` or `ptb`.")
        check_options(self)


def looks_like_path(reference: str) -> bool:
    """Return whether ``reference`` can only be a path, there or not: a hub id is ``name`` or ``owner/name``."""
    return reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference
